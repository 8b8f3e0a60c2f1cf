"""Joining components whose tokenizers differ: all but one get the vocabulary of that one, then they are composed.

What a transplant makes is the hybrid's own; the components' bodies stay where they are, referenced by commit.
"""

import os

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manticore_hf.compose.checkpoints import check_checkpoint, checkpoint_files
from manticore_hf.compose.component_tokenizers import digest, find_tokenizer
from manticore_hf.compose.components import ComponentSpec, load, resolve
from manticore_hf.compose.hybrid import ManticoreForCausalLM
from manticore_hf.compose.transplant.build import ATOMS, check_method
from manticore_hf.compose.transplant.coverage import TransplantReport
from manticore_hf.compose.transplant.transplant import transplant
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.references_manticore import component_files


def compose_transplanted(
    components: list,
    method: str = "auto",
    *,
    tokenizer_component: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    texts: list[str] | None = None,
    atoms: int = ATOMS,
    batch_size: int = 8,
    token: str | bool | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    progress: bool = True,
    **settings: object,
) -> tuple[ManticoreForCausalLM, PreTrainedTokenizerBase, dict[str, TransplantReport]]:
    """Composes a hybrid from causal LMs with different tokenizers.

    Args:
        components: Each a repo id, a local directory or a ComponentSpec of one; they come with their tokenizers.
        method: As in `transplant`; the donor is a component that has the hybrid's tokenizer.
        tokenizer_component: Component whose tokenizer is the hybrid's. Default: the first.
        tokenizer: A tokenizer for the hybrid instead of a component's.
        texts: List of texts to measure transplants on, and to choose the method by.
        atoms, batch_size, progress: As in `transplant`.
        token, cache_dir, local_files_only: As in `from_pretrained`.
        **settings: As in `ManticoreForCausalLM.from_components`.

    Returns:
        (the hybrid, its tokenizer, {component: TransplantReport} of those that were transplanted).

    Raises:
        ManticoreError: A component comes without a tokenizer, or cannot be joined or transplanted.
    """
    if method not in ("auto", "omp"):
        check_method(method, None)
    hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    specs = [ComponentSpec.of(item) for item in components]
    found = [resolve(spec, hub) for spec in specs]
    tokenizers = [_tokenizer_of(one, spec, hub) for one, spec in zip(found, specs)]
    names = [one.name for one in found]
    if tokenizer is None:
        if tokenizer_component is not None and tokenizer_component not in names:
            raise ManticoreError(f"tokenizer_component={tokenizer_component!r} is no component; choose one of {names}.")
        index = 0 if tokenizer_component is None else names.index(tokenizer_component)
        tokenizer, home = tokenizers[index], found[index]
    else:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise ManticoreError(f"tokenizer= is a {type(tokenizer).__name__}; give a tokenizer of Transformers.")
        home = None
    vocabulary = tokenizer.get_vocab()
    same = [one.get_vocab() == vocabulary for one in tokenizers]
    donor = next((one for one, equal in zip(found, same) if equal), None)
    donor_model = None if donor is None or all(same) or method == "mean" else _load(donor, hub)
    reports, given = {}, []
    for spec, one, own, equal in zip(specs, found, tokenizers, same):
        pinned = {**vars(spec), "name": one.name}
        if one.revision is not None:  # the commit that was read, whatever is pushed meanwhile
            pinned.update(source=one.repo_id, revision=one.revision)
        if not equal:
            model, reports[one.name] = transplant(
                _load(one, hub),
                own,
                tokenizer,
                method,
                texts,
                donor=donor_model,
                atoms=atoms,
                batch_size=batch_size,
                progress=progress,
            )
            entry = {"method": reports[one.name].method, "vocabulary": digest(vocabulary)}
            entry.update(tokenizer=_address(home), vocab_size=reports[one.name].rows[0])
            pinned.update(model=model.eval(), transplant=entry)
        given.append(ComponentSpec(**pinned))
    if tokenizer_component is None and donor is not None:
        tokenizer_component = donor.name
    model = ManticoreForCausalLM.from_components(given, tokenizer_component=tokenizer_component, **hub, **settings)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):  # also where the tokenizer's component says none
        if getattr(model.config, key, None) is None and getattr(tokenizer, key) is not None:
            setattr(model.config, key, getattr(tokenizer, key))
    return model, tokenizer, reports


def _tokenizer_of(found, spec, hub):
    """The tokenizer that a component comes with."""
    if isinstance(spec.source, PreTrainedModel) or spec.model is not None:
        raise ManticoreError(
            f"Component {found.name!r} is an instantiated model, which has no tokenizer; save it with its tokenizer "
            "(save_pretrained) and give the directory."
        )
    tokenizer = find_tokenizer(found, hub)
    if tokenizer is None:
        raise ManticoreError(
            f"Component {found.address} comes without a tokenizer that can be read, so its tokens cannot be compared "
            "with another's; put its tokenizer files beside its weights."
        )
    return tokenizer


def _load(found, hub):
    """A component's model in the dtype that it is stored in, checked as `from_components` does."""
    if found.repo_id is not None:
        files = component_files({**found.entry(), "files": None}, hub)
    else:
        files = checkpoint_files(os.path.join(found.directory, found.subfolder or ""))
    check_checkpoint(found.address, found.config, files)
    return load(found, found.config.dtype, hub).eval()


def _address(found):
    """Where the hybrid's tokenizer comes from, None if others cannot reach it."""
    if found is None or found.repo_id is None:
        return None
    return {"repo_id": found.repo_id, "revision": found.revision, "subfolder": found.subfolder}
