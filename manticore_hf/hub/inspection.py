"""What a hybrid is and costs, from its configuration: nothing is run, no code of the repo, no weights downloaded.

    manticore-hf inspect org/hybrid

The model is built on the meta device: shapes without storage. FLOPs are counted by torch over those shapes, for
`tokens` tokens without a past. Only the mixture weights are read from the hybrid's own file, by their byte range.
"""

import json
import math
import os
import re
from typing import Any

import torch
from huggingface_hub.errors import HTTPError
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.cache_utils import LinearAttentionCacheLayerMixin
from transformers.modeling_utils import local_torch_dtype

from manticore_hf.hub.licenses import combine, describe
from manticore_hf.hub.provenance import (
    component_state,
    open_weights,
    print_repository,
    print_state,
    read_header,
    repository,
    verify_cached,
    verify_own,
)
from manticore_hf.modeling.configuration_manticore import ManticoreConfig, ManticoreError
from manticore_hf.modeling.references_manticore import where
from manticore_hf.utils.flops import count_flops
from manticore_hf.utils.formatting import listed, listed_some, printable_output
from manticore_hf.utils.objective import say_objective
from manticore_hf.utils.saving import check_whole
from manticore_hf.utils.task_types import TASK_TYPES, labels_of, quantization_of, task_type_of

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LARGEST_INDEX = 50_000_000
_SHOWN_LABELS = 20


def inspect_hybrid(source: str | os.PathLike, tokens: int = 128, revision: str | None = None) -> dict[str, Any]:
    """Describes a hybrid, without its weights.

    Args:
        source: Directory or Hub repo.
        tokens: Tokens over which FLOPs and cache are counted.
        revision: Revision of a Hub repo.

    Returns:
        {"task": {...}, "quantization": text or None, "components": [...], "blocks": [...], "parts": [...], "settings":
        {...}}: plain values. `task` has its name, the class and, of a classifier, its labels and what is predicted.
        `blocks` has one row per block and component: layers, alpha (None where it cannot be read), parameters, FLOPs
        per token, bytes of cache per token and of constant state. `parts` has the same totals for each component alone,
        with its own head or score head, and the hybrid. Bytes are those of floating point, also where linear maps are
        packed (`quantization`). "note" is "", or says whose tokens are counted where there are several tokenizers.
    """
    if os.path.isdir(source):
        check_whole(source)
    config = ManticoreConfig.from_pretrained(source, **({} if revision is None else {"revision": revision}))
    for name in config.component_names:
        # The one way of running experts whose shapes do not depend on values.
        getattr(config, name)._experts_implementation_internal = "batched_mm"
    task_type = task_type_of(config)
    with torch.device("meta"), local_torch_dtype(config.dtype or torch.float32):
        model = task_type.model_class(config).eval()
    tokens = min(tokens, config.max_position_embeddings or tokens)
    alpha = _alpha(model, source, revision)
    blocks = []
    for block in sorted({block for _, block in model.segments.ranges}):
        for k, name in enumerate(config.component_names):
            if (name, block) in model.segments.ranges:
                weights = None if alpha is None else alpha[0 if config.bridges else block]
                row = {"block": block + 1, "component": name, **_segment(model, name, block, tokens)}
                blocks.append({**row, "alpha": None if weights is None else weights[k]})
    parts = [] if config.route else [_component(model, name, blocks, tokens) for name in config.component_names]
    parts.append(_hybrid(model, blocks, tokens, parts))
    keys = (
        "num_blocks",
        "embeddings",
        "projector",
        "projector_init",
        "gate",
        "mixture",
        "mixture_space",
        "mix_loss_weight",
        "component_loss_weight",
        "route",
        "reference_component",
        "tokenizer_component",
        "vocab_size",
        "max_position_embeddings",
    )
    idle = _idle_settings(model)
    settings = {key: None if key in idle else getattr(config, key) for key in keys}
    settings |= {"aligned": list(config.aligned)} if config.aligned else {}
    if config.bridges:
        settings |= {key: getattr(config, key) for key in ("topology", "bridge_blocks", "bridge_rank", "bridge_alpha")}
        settings["bridges"] = ", ".join(map(say_bridge, config.bridges))
    kinds = {name: getattr(config, name).model_type for name in config.component_names}
    components = [{**entry, "model_type": kinds[entry["name"]]} for entry in config.components]
    trained_on = None if "objective" in idle else say_objective(config)
    return {
        "task": {
            "name": task_type.task,
            "architecture": task_type.architecture,
            **(labels_of(config) if task_type.labels else {}),
        },
        "quantization": quantization_of(config),
        "note": _note(config),
        "components": components,
        "blocks": blocks,
        "parts": parts,
        "settings": {**settings, **({} if task_type.labels else {"objective": trained_on})},
    }


def _idle_settings(model):
    """Settings that this hybrid has, as every one, but makes no use of."""
    config, mixer, idle = model.config, model.hybrid_mixer, set()
    shares = mixer.into or mixer.out_of or mixer.across or (config.num_blocks > 1 and config.route is None)
    if not shares:  # no state enters or leaves a shared space
        idle |= {"projector", "projector_init", "gate", "reference_component"}
    if config.mixture == "online" and "open" in (config.objective or {}):  # its weights are not trained
        idle.add("objective")
    return idle


def say_bridge(edge: dict) -> str:
    """A bridge in words, with blocks counted from 1 as in tables: "mamba after block 3 to llama before block 1"."""
    said = f"{edge['from']} after block {edge['from_block'] + 1} to {edge['to']} before block {edge['to_block'] + 1}"
    return said + ("" if edge["kind"] == "linear" else f" ({edge['kind']})")


def _segment(model, name, block, tokens):
    segment = model.segments.segment(name, block)
    width = getattr(model.config, name).hidden_size
    if segment.start == 0:
        width = model.component(name).get_input_embeddings().weight.shape[1]
    view = model.make_cache().view(name, block)

    def run(mask):
        hidden = torch.zeros(1, tokens, width, device="meta", dtype=model.dtype)
        segment(hidden, mask, torch.arange(tokens, device="meta")[None], view)

    return {
        "layers": f"{segment.start}-{segment.stop - 1}",
        "parameters": sum(p.numel() for p in segment.layers.parameters()),
        "flops_per_token": _count(run, tokens),
        **layer_memory(view.layers, tokens),
    }


def _component(model, name, blocks, tokens):
    """A component alone: its segments, and its head or, of a classifier, its score head if it has one of its own."""
    component, rows = model.component(name), [row for row in blocks if row["component"] == name]
    own = None
    if task_type_of(model.config).labels:
        heads = model.score.heads
        own = next((heads[key] for key in heads if key == f"{name}-{model.config.num_blocks - 1}"), nn.Identity())

    def head(mask):
        if own is None:
            width = component.get_output_embeddings().weight.shape[1]
            model.segments.logits(name, torch.zeros(1, tokens, width, device="meta", dtype=model.dtype))
        elif isinstance(own, nn.Linear):
            own(torch.zeros(1, tokens, own.in_features, device="meta", dtype=own.weight.dtype))

    flops = sum(row["flops_per_token"] for row in rows) + _count(head, tokens)
    return {"part": name, **_size(component, own), "flops_per_token": flops, **_sum_memory(rows)}


def _hybrid(model, blocks, tokens, parts):
    def run(mask):
        model(input_ids=torch.zeros(1, tokens, device="meta", dtype=torch.long), attention_mask=mask, use_cache=False)

    if model.config.aligned:  # what it runs depends on the text
        flops = sum(part["flops_per_token"] for part in parts)
    else:
        flops = _count(run, tokens)
    memory = _sum_memory(blocks)
    memory["cache_bytes_per_token"] += bridge_cache(model)
    return {"part": "hybrid", **_size(model), "flops_per_token": flops, **memory}


def bridge_cache(model: nn.Module) -> int:
    """Bytes of cache that each token adds for a hybrid's bridges: keys and values of those that attend."""
    edges = () if model.hybrid_mixer.bridges is None else model.hybrid_mixer.bridges.edges
    return sum(one.store.out_features * one.store.weight.element_size() for one in edges if hasattr(one, "store"))


def _note(config):
    if not config.aligned:
        return ""
    return (
        f"{listed(config.aligned)} read{'s' if len(config.aligned) == 1 else ''} text by another tokenizer: FLOPs and "
        "cache are per token of each model's own, and the hybrid's are their sums, for one token of each. What is read "
        "again where a word can be split in several ways is not counted."
    )


def _size(*modules):
    parameters = [p for module in modules if module is not None for p in module.parameters()]
    return {
        "parameters": sum(p.numel() for p in parameters),
        "bytes": sum(p.numel() * p.element_size() for p in parameters),
    }


def _sum_memory(rows):
    return {key: sum(row[key] for row in rows) for key in ("cache_bytes_per_token", "state_bytes")}


def _count(run, tokens):
    """FLOPs per token. A mask, and tensors that are known to be fake, keep Transformers from looking at values."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        return count_flops(lambda: run(torch.ones(1, tokens, dtype=torch.long, device="meta"))) / tokens


def layer_memory(layers: list, tokens: int) -> dict[str, float]:
    """Bytes of cache that grow with the tokens, per token, and bytes that do not."""
    growing = constant = 0
    for layer in layers:
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if isinstance(tensor, torch.Tensor):
                growing += tensor.numel() * tensor.element_size()
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            for states in (layer.conv_states, layer.recurrent_states):
                constant += sum(s.numel() * s.element_size() for s in states.values() if s is not None)
    return {"cache_bytes_per_token": growing / tokens, "state_bytes": constant}


def _alpha(model, source, revision):
    """Rows of mixture weights, or None where they cannot be read; only their own bytes are fetched."""
    if model.config.mixture_weights is not None and None not in model.config.mixture_weights:
        return model.config.mixture_weights
    names = ["hybrid_mixer.alpha_logits"] + ["hybrid_mixer.token_gate.linear.bias"] * (model.config.mixture == "token")
    try:
        logits = [_read_tensor(source, name, revision) for name in names]
    except (
        OSError,
        LookupError,
        ValueError,
        TypeError,
        ArithmeticError,
        RuntimeError,
        HTTPError,
    ):  # damaged, or hostile
        return None
    count = len(model.config.component_names)
    if any(tuple(one.shape) != shape for one, shape in zip(logits, [(model.config.num_blocks, count), (count,)])):
        return None
    rows = logits[0].float().softmax(-1).tolist()
    if len(logits) > 1:
        rows[-1] = logits[1].float().softmax(-1).tolist()
    fixed = model.config.mixture_weights or [None] * len(rows)
    return [row if given is None else given for row, given in zip(rows, fixed)]


def _read_tensor(source, name, revision):
    """One tensor of a hybrid's own weights, by its byte range; of a Hub repo without the rest of the file."""
    try:
        opened = open_weights(source, "model.safetensors", revision)
    except FileNotFoundError:  # in shards
        with open_weights(source, "model.safetensors.index.json", revision) as index:
            shard = json.loads(index.read(_LARGEST_INDEX))["weight_map"][name]
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", shard):
            raise ValueError(f"{name} is in {shard!r}, which is no file beside the index") from None
        opened = open_weights(source, shard, revision)
    with opened as file:
        header, begin = read_header(file)
        entry = header[name]
        start, stop = entry["data_offsets"]
        dtype = _DTYPES[entry["dtype"]]
        if stop - start != math.prod(entry["shape"]) * dtype.itemsize or not 0 <= start <= stop <= start + 2**20:
            raise ValueError(f"{name} has impossible offsets")
        file.seek(begin + start)
        return torch.frombuffer(bytearray(file.read(stop - start)), dtype=dtype).reshape(entry["shape"])


def print_inspection(source: str, found: dict[str, Any]) -> None:
    """Prints what was found out about a hybrid as tables.

    Args:
        source: What it is called.
        found: What `inspect_hybrid` returned; with what `repository` did as "repository", and what `component_state`
            did as "state" of a component, if these were asked for.
    """
    task = found["task"]
    print(f"{source}: {TASK_TYPES[task['architecture']].noun} ({task['architecture']}, {task['name']})")
    if found["quantization"] is not None:
        print(
            f"its linear layers are quantised to {found['quantization']}: the sizes below are those of floating point"
        )
    if "labels" in task:
        shown = listed_some(task["labels"], _SHOWN_LABELS)
        print(f"{len(task['labels'])} labels: {shown}; {task['problem']}")
    print(", ".join(f"{key}={value}" for key, value in found["settings"].items() if value is not None))
    print("\ncomponents")
    for entry in found["components"]:
        where = f"{entry['repo_id']}@{entry['revision']}" if entry["repo_id"] else "its weights are in this repo"
        state = f"; {print_state(entry['state'])}" if entry.get("state") else ""
        print(f"  {entry['name']}: {entry['model_type']}, {where}, licence {entry['license'] or 'not recorded'}{state}")
        if entry["transplant"] is not None:
            rows, method = entry["transplant"]["vocab_size"], entry["transplant"]["method"]
            print(f"    its vocabulary was transplanted ({method}), from one of {rows} rows")
    licenses = {entry["name"]: entry["license"] for entry in found["components"]}
    print(f"licence of the hybrid: {describe(combine(licenses))}")
    if "repository" in found:
        print_repository(source, found["repository"])
    heads = ("parameters", "FLOPs/token", "cache B/token", "state B")
    width = max(len(row["component"]) for row in found["blocks"])
    print(f"\n{'block':>5}  {'component':{width}}  {'layers':>7}  {'alpha':>6}" + "".join(f"{h:>15}" for h in heads))
    for row in found["blocks"]:
        alpha = "?" if row["alpha"] is None else f"{row['alpha']:.3f}"
        print(f"{row['block']:>5}  {row['component']:{width}}  {row['layers']:>7}  {alpha:>6}" + _numbers(row))
    print(f"\n{'model':{width + 7}}  {'':>15}" + "".join(f"{h:>15}" for h in heads))
    for row in found["parts"]:
        print(f"{row['part']:{width + 7}}  {'':>15}" + _numbers(row))
    if found["note"]:
        print(found["note"])


def _numbers(row):
    keys = ("parameters", "flops_per_token", "cache_bytes_per_token", "state_bytes")
    return "".join(f"{row[key]:>15,.0f}" for key in keys)


def run_inspect(source: str, revision: str | None = None, as_json: bool = False, verify: bool = False) -> list[str]:
    """`manticore-hf inspect`: prints what a hybrid is and costs, where its repository is, and how its components are.

    Args:
        source: Directory or Hub repo.
        revision: Revision of a Hub repo.
        as_json: Print plain values instead of tables.
        verify: Hash the weight files in the local cache anew, the hybrid's own, too; damaged ones are removed there.

    Returns:
        What was found to be damaged, and removed from the cache: components and names of files.

    Raises:
        ManticoreError: There is no hybrid that can be read.
    """
    damage = []
    try:
        found = inspect_hybrid(source, revision=revision)
        found["repository"] = repository(source, revision)
        for entry in found["components"]:
            if entry["weights"] == "reference":
                entry["state"] = component_state(entry)
                if verify:
                    entry["state"]["cache"] = verify_cached(entry)
                    damage += [f"{where(entry)}: {name}" for name in entry["state"]["cache"]["damaged"]]
        if verify:
            damage += verify_own(source, found["repository"])
    except (OSError, HTTPError) as err:
        raise ManticoreError(f"{source!r} cannot be read as a hybrid: {err}") from err
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        with printable_output():  # names of files are a stranger's, too
            print_inspection(source, found)
    return damage
