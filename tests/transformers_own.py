"""Transformers' own tests of models, on hybrids: found in its source distribution, never copied.

    python tests/transformers_own.py KIND [NAME...]

runs `ModelTesterMixin` (`tests/test_modeling_common.py`) on one of KINDS, or the tests named, and prints what came out
as one line of JSON. The sources are those of TRANSFORMERS_SOURCE (a checkout, or an unpacked source distribution, of
the installed version), else they come from the package registry into a temporary folder. A source distribution has
`ModelTesterMixin`, but neither the tests of generation nor those of exporters that it inherits: they are left out
where they are absent, and run where they are there.
"""

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from pathlib import Path

import torch
import transformers
from transformers.models.auto import modeling_auto

PACKAGE = "transformers_own_tests"
KINDS = {
    "gpt_neox": ("gpt_neox",),  # plain: what the numbers of hybrids are measured by
    "gpt_neox+llama": ("gpt_neox", "llama"),
    "gpt_neox+mamba": ("gpt_neox", "mamba"),
    "gpt_neox+llama, two blocks": ("gpt_neox", "llama"),
    "gpt_neox+mamba, two blocks": ("gpt_neox", "mamba"),
}
MISSING = ("exporters.test_export.ExportTesterMixin", "generation.test_utils.GenerationTesterMixin")
CLASSES = {
    "MODEL_MAPPING_NAMES": "ManticoreModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "ManticoreForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "ManticoreForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "ManticoreForTokenClassification",
}


def source(root):
    """Folder of the sources with their `tests`; what has to be fetched is unpacked below `root`.

    Raises:
        OSError: They are not there, and cannot be had.
    """
    given = os.environ.get("TRANSFORMERS_SOURCE")
    if given is None:
        wanted = f"transformers=={transformers.__version__}"
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-build-isolation"]
        found = subprocess.run(
            [*command, "--no-binary", ":all:", "-d", str(root), wanted], capture_output=True, text=True
        )
        archives = list(Path(root).glob("transformers-*.tar.gz"))
        if not archives:
            raise OSError(f"no source distribution of {wanted} from the registry: {found.stderr[-300:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(root, filter="data")
        given = Path(root) / f"transformers-{transformers.__version__}"
    if not (Path(given) / "tests" / "test_modeling_common.py").is_file():
        raise OSError(f"{given} has no tests/test_modeling_common.py")
    return Path(given)


def common(folder):
    """The module `test_modeling_common` of the sources in `folder`."""
    package = types.ModuleType(PACKAGE)
    package.__path__ = [str(folder / "tests")]
    sys.modules[PACKAGE] = package
    for path in MISSING:
        name, _, mixin = path.rpartition(".")
        try:
            importlib.import_module(f"{PACKAGE}.{name}")
        except ModuleNotFoundError as err:
            if not (err.name or "").startswith(PACKAGE):
                raise
            stand_in = types.ModuleType(f"{PACKAGE}.{name}")
            setattr(stand_in, mixin, type(mixin, (), {}))
            sys.modules[stand_in.__name__] = stand_in
    return importlib.import_module(f"{PACKAGE}.test_modeling_common")


UNFIT = {
    "test_keep_in_fp32_modules": "a hybrid's list is of what quantisers leave out (dtypes_manticore.py)",
    "test_model_base_model_prefix": "a hybrid's causal LM is its base model with a mixture: there is no model inside",
    "test_model_get_set_embeddings": "each component has embeddings of its own",
    "test_model_rope_scaling_frequencies": "a component's class of RoPE takes that component's configuration",
    "test_model_weights_reload_no_missing_tied_weights": "a file without a hybrid's weights is refused",
    "test_load_with_mismatched_shapes": "a vocabulary's size is said by each component's configuration",
    "test_retain_grad_hidden_states_attentions": "where embeddings are native, nothing reads the first shared state",
}
"""Tests that ask for what hybrids are not."""

OF_COMPONENTS_WITH_ROPE = ("test_model_rope_scaling_from_config", "test_model_rope_with_partial_rotation")
"""Tests that set RoPE's parameters in a configuration and all that are in it, which has to show in what is computed."""

# ---- what is tested --------------------------------------------------------------------------------------------------

_SIZES = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 37,
    "max_position_embeddings": 512,
}  # fmt: skip
_FAMILIES = {
    "gpt_neox": {**_SIZES, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    "llama": {**_SIZES, "num_key_value_heads": 2},
    "mamba": {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 8},
}


def _layers(kind):
    """Layers of each component: so that a hybrid of one block has as many attentions in all as a plain model."""
    return 1 if len(KINDS[kind]) > 1 and "blocks" not in kind else 2


def configuration(kind, is_tied=False):
    """A new configuration of a kind."""
    tokens = {"vocab_size": 99, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tokens |= {"tie_word_embeddings": is_tied, "num_hidden_layers": _layers(kind)}
    parts = {name: transformers.AutoConfig.for_model(name, **{**_FAMILIES[name], **tokens}) for name in KINDS[kind]}
    if len(parts) == 1:
        return parts.popitem()[1]
    from manticore_hf import ManticoreConfig

    blocks = 2 if "two blocks" in kind else 1
    preset = "paper" if blocks > 1 else "default"
    components = [{"name": name, "config": part} for name, part in parts.items()]
    ids = {key: tokens[key] for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return ManticoreConfig(components=components, num_blocks=blocks, preset=preset, **ids)


def classes(kind):
    """The model classes of a kind."""
    if len(KINDS[kind]) == 1:
        names = (
            f"GPTNeoX{end}" for end in ("Model", "ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
        )
        return [getattr(transformers, name) for name in names]
    import manticore_hf

    return [getattr(manticore_hf, name) for name in CLASSES.values()]


class Tester:
    """What the tests of Transformers ask of a `model_tester`."""

    batch_size, seq_length, is_training = 13, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_labels = 99, 64, 2, 2
    num_attention_heads = 4

    def __init__(self, kind, module):
        self.kind, self.module, self.is_tied, self.has_rope = kind, module, False, False
        if len(KINDS[kind]) > 1:  # as many attentions as layers attend, as many states as blocks have boundaries
            self.num_hidden_layers = _layers(kind) * sum(name != "mamba" for name in KINDS[kind])
            self.expected_num_hidden_layers = 3 if "blocks" in kind else 2

    def get_config(self):
        """A new configuration."""
        config = configuration(self.kind, self.is_tied)
        if self.has_rope:  # by which the tests see whether they can be run; what is computed is the components'
            config.rope_parameters = dict(getattr(config, config.component_names[0]).rope_parameters)
            if "mamba" in KINDS[self.kind]:  # without RoPE: what the tests set there has no effect
                config.mamba._rope_type_labels = None
        return config

    def prepare_config_and_inputs_for_common(self):
        """(configuration, {argument of a forward: value})."""
        ids = self.module.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.tril(torch.ones_like(ids))}


def case(kind, module):
    """The TestCase of a kind."""

    class Case(module.ModelTesterMixin, module.GenerationTesterMixin, unittest.TestCase):
        has_attentions = True

        def setUp(self):
            self.all_model_classes = classes(kind)
            self.model_tester = Tester(kind, module)
            if len(KINDS[kind]) > 1:
                # Each component has an attention implementation of its own, and the hybrid's is that of all: what is
                # asked of composite models and what is asked of others holds for both.
                self._is_composite = "composite" in self.id() and "non_composite" not in self.id()
                asks = self.id().rpartition(".")[2].startswith(OF_COMPONENTS_WITH_ROPE)
                self.model_tester.has_rope = asks

        def test_tied_weights_keys(self):
            # Whether its weights are tied says each component's configuration
            self.model_tester.is_tied = True
            super().test_tied_weights_keys()

        def test_reverse_loading_mapping(self):
            # A hybrid's file has the names that its model has
            super().test_reverse_loading_mapping(check_keys_were_modified=len(KINDS[kind]) == 1)

        def test_num_layers_is_small(self):
            self.model_tester.num_hidden_layers = _layers(kind)
            super().test_num_layers_is_small()

    for name, reason in UNFIT.items() if len(KINDS[kind]) > 1 else ():
        if name != "test_retain_grad_hidden_states_attentions" or "blocks" not in kind:
            setattr(Case, name, unittest.skip(reason)(lambda self: None))
    Case.__name__ = "ModelTest"
    return Case


def run(kind, folder, names=()):
    """{"passed": number, "failed": {name: last line of the error}, "skipped": {name: reason}}."""
    if len(KINDS[kind]) > 1:
        for mapping, name in CLASSES.items():
            getattr(modeling_auto, mapping)["manticore"] = name
    case_class = case(kind, common(folder))
    wanted = names or unittest.TestLoader().getTestCaseNames(case_class)
    suite, result = unittest.TestSuite(case_class(name) for name in wanted), unittest.TestResult()
    with contextlib.redirect_stdout(sys.stderr):
        suite.run(result)
    wrong, skipped = {}, {}
    for test, trace in (*result.failures, *result.errors):
        print(trace, file=sys.stderr)
        wrong[_name(test)] = trace.strip().splitlines()[-1]
    for test, reason in result.skipped:
        if isinstance(test, case_class):  # not a part of one, whose other parts ran
            skipped[_name(test)] = reason
    return {"passed": result.testsRun - len(wrong) - len(skipped), "failed": wrong, "skipped": skipped}


def _name(test):
    return getattr(test, "test_case", test).id().rpartition(".")[2]


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(run(sys.argv[1], source(root), sys.argv[2:])))
