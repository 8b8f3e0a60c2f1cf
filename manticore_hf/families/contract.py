"""What a family must do to be a component, as checks that raise `Broken`; the tests and the sweep run the same ones.

Every check compares two ways to the same result: cut with uncut, padded with alone, cached with uncached, saved with
loaded. Models are tiny, random and strong (`tiny.py`), so that a difference shows.
"""

import copy
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.utils import GenerateOutput

from manticore_hf.compose.components import ComponentSpec
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.families.tiny import tokens
from manticore_hf.modeling.layer_stack_manticore import Segment, find_layout
from manticore_hf.modeling.segments_manticore import Head, Whole

PADDING = 3
"""Tokens of left padding of the first of two rows."""

ROUNDING = {torch.float32: (2e-5, 1e-5), torch.float64: (1e-9, 1e-9)}
"""How much results may differ by rounding, by dtype: absolutely, for values of order 1, and relatively.

Most types stay below 7e-6 in float32; the gated delta rule (Qwen3-Next, Qwen3.5, OLMo hybrid), in chunks and in steps,
comes to 2e-5, and to 3e-5 with experts. In float64 all are of order 1e-15. CUDA kernels round more coarsely (fast
exponentials, sums in an order that depends on the shape): there float32 may differ by 20 times as much.
"""

NATIVE = {"gate": "none", "embeddings": "native", "mixture": "static"}
PAPER = {"preset": "paper"}


class Broken(AssertionError):
    """Two ways to one result differ; the message says which, and by how much."""


def same(got: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    """Raises Broken unless two tensors are equal to the last bit."""
    if not torch.equal(got, wanted):
        _differ(got, wanted, what)


def close(got: torch.Tensor, wanted: torch.Tensor, what: str = "results", atol: float | None = None) -> None:
    """Raises Broken unless two tensors are equal up to the rounding of sums taken in another order.

    Args:
        got, wanted: Tensors.
        what: Both ways, in words: "cached and uncached logits".
        atol: For values of order 1; larger values may differ by as much more. Default: `ROUNDING` of the dtype.
    """
    usual, rtol = ROUNDING[wanted.dtype]
    if wanted.is_cuda and wanted.dtype != torch.float64:
        usual, rtol = 20 * usual, 20 * rtol
    atol = usual if atol is None or wanted.dtype == torch.float64 else atol
    if got.shape == wanted.shape and wanted.numel():
        atol *= max(1.0, wanted.detach().float().abs().mean().item())
    if got.shape != wanted.shape or not torch.allclose(got, wanted, atol=atol, rtol=rtol):
        _differ(got, wanted, what)


def _differ(got, wanted, what):
    if got.shape != wanted.shape:
        raise Broken(f"{what} differ in shape ({tuple(got.shape)} and {tuple(wanted.shape)})")
    if not wanted.is_floating_point():
        raise Broken(f"{what} differ")
    by, size = (got - wanted).abs().max().item(), wanted.abs().max().item()
    raise Broken(f"{what} differ (by {by:.2g} where the largest is {size:.2g})")


def left_padded(time: int = 9, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two rows, the first with left padding: ids, mask, positions, each [2, time]."""
    ids, mask = tokens(2, time, device=device), torch.ones(2, time, dtype=torch.long, device=device)
    ids[0, :PADDING], mask[0, :PADDING] = 0, 0
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


# ---------------------------------------------------------------------------------------------------------------------
# Of a component.


@torch.no_grad()
def check_segments(component: PreTrainedModel, bounds: Sequence[int]) -> None:
    """Segments in sequence are the uncut component, to the last bit, with left padding and without; so is its head.

    Args:
        component: A causal LM in evaluation mode.
        bounds: Where it is cut: (0, 2, depth).
    """
    layout = find_layout(component)
    stack = component.get_submodule(layout.path)
    ids, mask, positions = left_padded(device=component.device)
    what = f"the model in {len(bounds) - 1} segments and the uncut model"
    for given in (None, mask):
        where = positions if given is not None else torch.arange(ids.shape[1], device=ids.device)[None]
        kwargs = {"position_ids": where} if layout.positions else {}
        wanted = stack(input_ids=ids, attention_mask=given, use_cache=False, **kwargs)[0]
        state = component.get_input_embeddings()(ids)
        for start, stop in zip(bounds, bounds[1:]):
            make = Whole if len(bounds) == 2 else Segment
            state = make(component, layout, start, stop)(state, given, where)
        same(state, wanted, what)
    kwargs = {"position_ids": positions} if "position_ids" in inspect.signature(component.forward).parameters else {}
    wanted = component(input_ids=ids, attention_mask=mask, use_cache=False, **kwargs).logits
    same(Head(component, layout)(state), wanted, "the logits of a component's last state and its own logits")


@torch.no_grad()
def check_one_hot(parts: Sequence[ComponentSpec], settings: dict[str, Any], blocks: Sequence[int] = (1, 2, 3)) -> None:
    """A hybrid whose mixture is one component is that component: logits and loss, to the last bit.

    Args:
        parts: ComponentSpecs of instances.
        settings: `NATIVE` or `PAPER`.
        blocks: Numbers of blocks.
    """
    device = parts[0].source.device
    ids = tokens(device=device)
    upstream = [spec.source(input_ids=ids, use_cache=False).logits for spec in parts]
    # From here on the components are repaired (scans in another order; RecurrentGemma's left padding)
    ManticoreForCausalLM.from_components(parts)
    for spec, wanted in zip(parts, upstream):
        got = spec.source(input_ids=ids, use_cache=False).logits
        close(got, wanted, "the component's logits before and after it was joined", atol=1e-5)
    ids, mask, positions = left_padded(device=device)
    labels = ids.masked_fill(mask == 0, -100)
    for spec in parts:
        takes, wanted = inspect.signature(spec.source.forward).parameters, {}
        for given in (None, mask):
            # Left alone, the component would count positions from the padding
            extra = {"position_ids": positions} if given is not None and "position_ids" in takes else {}
            wanted[given is None] = spec.source(
                input_ids=ids, attention_mask=given, labels=labels, use_cache=False, **extra
            )
        for count in blocks:
            # Projectors do not vanish without the paper's gate; those of the reference component are the identity
            extra = {"reference_component": spec.name} if settings is NATIVE else {}
            model = ManticoreForCausalLM.from_components(parts, num_blocks=count, verify=False, **settings, **extra)
            randomise(model)
            model.set_mixture_weights(spec.name)
            what = f"of a hybrid that is one component in {count} blocks and those of the component"
            for given in (None, mask):
                real = torch.ones_like(ids, dtype=torch.bool) if given is None else mask.bool()
                got = model(input_ids=ids, attention_mask=given, labels=labels, use_cache=False)
                same(got.logits[real], wanted[given is None].logits[real], f"logits {what}")
                same(got.loss, wanted[given is None].loss, f"losses {what}")


def check_gradients(component: PreTrainedModel, blocks: int = 2) -> None:
    """Training a component cut into blocks gives every parameter the gradient that training it uncut gives.

    Args:
        component: A causal LM without dropout.
        blocks: Number of blocks.
    """
    ids, component = tokens(device=component.device), copy.deepcopy(component)
    model = ManticoreForCausalLM.from_components(
        [ComponentSpec(component, name="one")], num_blocks=blocks, verify=False, **NATIVE
    ).train()
    found = []
    for module in (component, model):
        component.zero_grad()
        torch.manual_seed(0)  # routers (PhiMoE's) draw random numbers in training
        module(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append({name: p.grad for name, p in component.named_parameters() if p.grad is not None})
    wanted, got = found
    if not wanted or got.keys() != wanted.keys():
        raise Broken(f"{len(got)} parameters of the cut model get a gradient, {len(wanted)} of the uncut one")
    for name in wanted:
        if not wanted[name].isfinite().all():
            raise Broken(f"the gradient of {name} is not finite")
        close(got[name], wanted[name], f"gradients of {name} in the cut and the uncut model")
    component.zero_grad()


# ---------------------------------------------------------------------------------------------------------------------
# Of a hybrid.


def randomise(model: ManticoreForCausalLM, seed: int = 7, scale: float = 0.1) -> None:
    """Perturbs everything the hybrid adds to its components (projectors, alpha, token gate)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.hybrid_mixer.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(scale * noise.to(parameter.device))


@torch.no_grad()
def naive_greedy(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy decoding that runs the whole sequence each time. Returns (tokens, logits [batch, steps, vocabulary])."""
    logits = []
    for _ in range(steps):
        logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1].float())
        ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], -1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], -1)
    return ids, torch.stack(logits, 1)


def generate(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor | None = None, steps: int = 6, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor, GenerateOutput]:
    """Returns (tokens, logits [batch, steps, vocabulary], output)."""
    kwargs = {"do_sample": False, "max_new_tokens": steps, "use_cache": True, **kwargs}  # MPT's default is not to
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return out.sequences, torch.stack(out.logits, 1), out


def check_greedy(model: ManticoreForCausalLM, steps: int = 6) -> None:
    """`generate` with a cache gives the tokens and logits of running everything again, of a padded batch."""
    ids, mask, _ = left_padded(8, model.device)
    wanted, wanted_logits = naive_greedy(model, ids, mask, steps)
    got, logits, out = generate(model, ids, mask, steps)
    close(logits, wanted_logits, "logits with a cache and without")
    same(got, wanted, "tokens generated with a cache and without")
    if out.cache.get_seq_length() != ids.shape[1] + steps - 1:
        raise Broken("the cache has another length than what it was given")


def check_padding(model: ManticoreForCausalLM, steps: int = 6) -> None:
    """A row with left padding generates what it does alone, in a batch and by itself."""
    ids, mask, _ = left_padded(8, model.device)
    alone, alone_logits = naive_greedy(model, ids[:1, PADDING:], mask[:1, PADDING:], steps)
    for rows in (2, 1):  # a batch of one may take other paths upstream
        got, logits, _ = generate(model, ids[:rows], mask[:rows], steps)
        close(logits[:1], alone_logits, "logits of a padded row and of the row alone")
        same(got[:1, PADDING:], alone, "tokens of a padded row and of the row alone")


def check_beams(model: ManticoreForCausalLM) -> None:
    """Beam search with a cache, whose rows are reordered at every step, is that without one."""
    ids, mask, _ = left_padded(8, model.device)
    kwargs = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True}
    wanted, wanted_logits, uncached = generate(model, ids, mask, use_cache=False, **kwargs)
    got, logits, cached = generate(model, ids, mask, **kwargs)
    same(got, wanted, "beams with a cache and without")
    same(cached.beam_indices, uncached.beam_indices, "beams' origins with a cache and without")
    close(cached.sequences_scores, uncached.sequences_scores, "beams' scores with a cache and without")
    close(logits, wanted_logits, "beams' logits with a cache and without")


@torch.no_grad()
def check_chunks(model: ManticoreForCausalLM, sizes: Sequence[int]) -> None:
    """A padded batch read in chunks of these sizes, in turns, gives the logits of reading it at once."""
    ids = tokens(2, 11, device=model.device)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    whole = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache, start, parts, i = model.make_cache(), 0, [], 0
    while start < 11:
        stop = min(start + sizes[i % len(sizes)], 11)
        out = model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], cache=cache)
        parts.append(out.logits)
        start, i = stop, i + 1
    real = mask.bool()
    close(torch.cat(parts, 1)[real], whole[real], f"logits of a text in chunks of {sizes} and of the whole")
    if out.cache is not cache or cache.get_seq_length() != 11:
        raise Broken("the cache has another length than what it was given")


@torch.no_grad()
def check_padding_inside(model: ManticoreForCausalLM) -> None:
    """Rows with padding left, right and between tokens are the rows alone: at once, cached, in chunks, generated on."""
    mask = torch.tensor(
        [[0, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1], [1] * 5 + [0] * 3 + [1] * 2 + [0] * 2], device=model.device
    )
    ids, real = tokens(2, 12, 5, model.device), mask.bool()
    alone = [row[kept][None] for row, kept in zip(ids, real)]
    wanted = torch.cat([model(input_ids=row, use_cache=False).logits[0] for row in alone])
    got = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    close(got[real], wanted, "logits of a row with padding inside and of the row alone")
    for cuts in ((0, 12), (0, 8, 12), (0, 3, 4, 5, 7, 11, 12)):
        cache = model.make_cache()
        parts = [
            model(input_ids=ids[:, a:b], attention_mask=mask[:, :b], cache=cache).logits for a, b in zip(cuts, cuts[1:])
        ]
        close(torch.cat(parts, 1)[real], wanted, f"cached logits, cut at {cuts}, of a padded row and of the row alone")
    for beams in (1, 3):
        tail = [generate(model, row, steps=4, num_beams=beams)[0][0, -4:] for row in alone]
        got, _, _ = generate(model, ids[:1], mask[:1], 4, num_beams=beams)
        same(got[0, -4:], tail[0], f"tokens after padding inside and after the row alone, {beams} beams")
        turned = torch.cat([ids, ids[:, :2]], 1), torch.cat([mask, torch.ones_like(mask[:, :2])], 1)
        _, _, first = generate(model, ids[:, :9], mask[:, :9], 1)
        got, _, _ = generate(model, *turned, 4, num_beams=beams, cache=first.cache if beams == 1 else None)
        for row, one, lone in zip(got, ids, alone):
            wanted, _, _ = generate(model, torch.cat([lone, one[None, :2]], 1), steps=4, num_beams=beams)
            same(row[-4:], wanted[0, -4:], f"tokens of a second turn after padding and of the row alone, {beams} beams")


def check_documents(model: ManticoreForCausalLM) -> None:
    """Documents in one row are each as if alone: logits, loss and gradients."""
    lengths, device = [[5, 1, 7, 3], [2, 14]], model.device
    ids = tokens(2, 16, 6, device)
    alone = [one[None] for row, sizes in zip(ids, lengths) for one in row.split(sizes)]
    positions = torch.stack([torch.cat([torch.arange(n) for n in sizes]) for sizes in lengths]).to(device)
    results = []
    for packed in (True, False):
        model.zero_grad()
        if packed:
            out = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False)
            logits, loss = out.logits.flatten(0, 1), out.loss
        else:
            outs = [model(input_ids=one, labels=one, use_cache=False) for one in alone]
            weights = [one.shape[1] - 1 for one in alone]
            logits = torch.cat([out.logits[0] for out in outs])
            loss = sum(out.loss * n for out, n in zip(outs, weights) if n) / sum(weights)
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((logits.detach(), loss.detach(), grads))
    (logits, loss, grads), (wanted, wanted_loss, wanted_grads) = results
    model.zero_grad()
    close(logits, wanted, "logits of documents in one row and of each alone")
    close(loss, wanted_loss, "losses of documents in one row and of each alone")
    if grads.keys() != wanted_grads.keys():
        raise Broken("other parameters get a gradient from documents in one row than from each alone")
    for name in grads:
        close(grads[name], wanted_grads[name], f"gradients of {name} by documents in one row and by each alone")


@torch.no_grad()
def check_turns(model: ManticoreForCausalLM) -> None:
    """Two sequences decoded by turns, each with its cache: nothing of one lives outside of it."""
    one, two = tokens(1, 6, 3, model.device), tokens(1, 6, 4, model.device)
    whole = [model(input_ids=x, use_cache=False).logits for x in (one, two)]
    caches, parts = [model.make_cache(), model.make_cache()], [[], []]
    for start, stop in [(0, 4), (4, 5), (5, 6)]:
        for i, ids in enumerate((one, two)):
            parts[i].append(model(input_ids=ids[:, start:stop], cache=caches[i]).logits)
    for part, wanted in zip(parts, whole):
        close(torch.cat(part, 1), wanted, "logits of two sequences by turns and of each at once")


def check_static_cache(model: ManticoreForCausalLM) -> None:
    """A static cache gives what no cache gives: by `generate`, and in chunks with room to spare."""
    ids, mask, _ = left_padded(8, model.device)
    wanted, wanted_logits = naive_greedy(model, ids, mask, 6)
    got, logits, out = generate(model, ids, mask, cache_implementation="static")
    close(logits, wanted_logits, "logits with a static cache and without")
    same(got, wanted, "tokens generated with a static cache and without")
    if out.cache.max_cache_len < got.shape[1] - 1:
        raise Broken("the static cache is shorter than what was generated")
    ids, cache = tokens(1, 10, device=model.device), model.make_cache(16)
    with torch.no_grad():
        parts = [model(input_ids=ids[:, a:b], cache=cache).logits for a, b in [(0, 6), (6, 7), (7, 10)]]
        whole = model(input_ids=ids, use_cache=False).logits
    close(torch.cat(parts, 1), whole, "logits in chunks with a static cache and at once")


@torch.no_grad()
def check_saved(model: ManticoreForCausalLM, folder: str | Path) -> None:
    """A hybrid that was saved and loaded has the same tensors and gives the same logits.

    Args:
        model: A hybrid in evaluation mode.
        folder: An empty directory.
    """
    model.save_pretrained(folder)
    loaded = ManticoreForCausalLM.from_pretrained(folder).eval().to(model.device)
    before, after = model.state_dict(), loaded.state_dict()
    if before.keys() != after.keys():
        raise Broken(f"the saved and the loaded hybrid differ in tensors: {sorted(before.keys() ^ after.keys())[:3]}")
    for name in before:
        same(after[name], before[name], f"{name} saved and loaded")
    # A file's tensors lie at other addresses, where products of one row round otherwise (Qwen3-Next's gates)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        tensor.data = tensor.data.clone()
    ids = tokens(device=model.device)
    same(loaded(input_ids=ids).logits, model(input_ids=ids).logits, "logits of the saved and the loaded hybrid")
