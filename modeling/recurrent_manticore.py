"""RecurrentGemma's recurrent blocks with their state in the cache.

Transformers 5.24 keeps that state in the modules. Beams are then not reordered, a call with several tokens after the
first starts its convolution from nothing, left padding leaks into the convolution, and two sequences cannot be decoded
by turns. Here the state lives in the `LinearAttentionLayer` that `DynamicCache` makes for such a layer anyway.
"""

import torch.nn.functional as F
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRecurrentBlock

_MASK = "padding_mask"


class CachedRecurrentBlock(RecurrentGemmaRecurrentBlock):
    """The recurrent block of Griffin (De et al. 2024, arXiv:2402.19427, section 2), a drop-in for its base class."""

    # With weights on the meta device torch 2.13's convolution does not fail: it returns memory as it finds it
    @force_accelerate_hooks("conv_1d")
    def forward(
        self,
        input_states: Tensor,
        position_ids: Tensor,
        attention_mask: Tensor | None,
        use_cache: bool = True,
        cache: Cache | None = None,
        padding_mask: Tensor | None = None,
        **_: object,
    ) -> tuple[Tensor, None]:
        """Runs the block.

        Args:
            input_states: [batch, time, width].
            position_ids: [batch or 1, time]; the recurrence starts anew where they are 0.
            attention_mask: Not used: a mask for attention.
            use_cache: Not used: a cache is used if there is one.
            cache: A cache whose layer `self.layer_idx` is a LinearAttentionLayer, or None.
            padding_mask: [batch, time], 1 for real tokens, or None.
        """
        time = input_states.shape[1]
        entering = self.linear_x(input_states)
        if padding_mask is not None:
            entering = entering * padding_mask[:, -time:, None].to(entering.dtype)
        entering = entering.transpose(1, 2)
        window, state = entering, None
        if cache is not None:
            state = cache.get_recurrent_state(self.layer_idx)
            window = cache.update_conv_state(entering, self.layer_idx, conv_kernel_size=self.conv1d_width - 1)
        # The first call's window may be padded on the left, and a later one's holds what came before
        missing = max(self.conv1d_width - 1 + time - window.shape[-1], 0)
        window = F.pad(window, (missing, 0))[..., 1 - self.conv1d_width - time :]
        mixed = F.conv1d(window, self.conv_1d.weight, self.conv_1d.bias, groups=self.conv_1d.groups)
        self.rg_lru.recurrent_states = state
        try:
            mixed = self.rg_lru(mixed.transpose(1, 2), position_ids)
            state = self.rg_lru.recurrent_states
        finally:
            # Left in the module, it would reach the next sequence, and keep a graph alive
            self.rg_lru.recurrent_states = None
        if cache is not None:
            cache.update_recurrent_state(state, self.layer_idx)
        return self.linear_out(mixed * self.act_fn(self.linear_y(input_states))), None


def _hand_mask_on(module, args, kwargs):
    # The model makes a mask for attention of it, and gives the blocks only that; other keywords it hands on
    mask = kwargs.get("attention_mask")
    if mask is None or getattr(mask, "ndim", 0) != 2:
        return None
    return args, {**kwargs, _MASK: mask}


_hand_mask_on._manticore_state = True


def keep_state_in_cache(component: PreTrainedModel) -> None:
    """Repairs a RecurrentGemma; any other component is left alone.

    Nothing is added to the parameters, and calling again changes nothing.

    Args:
        component: A causal LM.
    """
    found = False
    for module in component.modules():
        if type(module) is RecurrentGemmaRecurrentBlock:
            module.__class__ = CachedRecurrentBlock
            found = True
    if not found:
        return
    for index, layer in enumerate(component.base_model.layers):
        if isinstance(layer.temporal_block, CachedRecurrentBlock):
            layer.temporal_block.layer_idx = index
    stack = component.base_model
    if not any(getattr(hook, "_manticore_state", False) for hook in stack._forward_pre_hooks.values()):
        stack.register_forward_pre_hook(_hand_mask_on, with_kwargs=True)
