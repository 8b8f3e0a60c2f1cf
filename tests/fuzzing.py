"""Mutations of nested values and of texts, drawn from a `random.Random`, and a guard that ends what hangs.

Hypothesis hands the tests its own Random (`st.randoms()`), so that a failure shrinks and comes again. The examples are
the same in every run; `FUZZ=20 pytest -n 0 tests/test_fuzz_config.py` draws twenty times as many new ones.
"""

import contextlib
import copy
import logging
import os
import signal
import warnings

from hypothesis import HealthCheck, Phase, settings

from manticore_hf import ManticoreError

HOSTILE_VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 0.0, -0.5, 1.5, 1e308, float("nan"), float("inf"), -float("inf"),
    2**16, 2**31, 2**63, -(2**63), 10**12, 10**30, "", "x", "0", "1e9", "none", "\x00\u202e\ud800é", "ü" * 200_000,
    "../../etc/passwd", "https://evil.example/x", "org/repo", "org/repo--module.Class", "kernels-community/flash-attn3",
    "cuda", "eager", "flash_attention_2", "float16", "os", "load", [], [[]], {}, {"": {}}, [0], [None], [1, 1], ["a"],
    [0.5, 0.5], {"0": 1}, {"factor": -1.0, "rope_type": "linear"}, {"rope_type": "yarn"}, {"model_type": "gpt2"},
]  # fmt: skip
HOSTILE_KEYS = [
    "self", "cls", "__class__", "__dict__", "to_dict", "get_text_config", "attribute_map", "auto_map", "model_type",
    "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "experts_implementation",
    "quantization_config", "torch_dtype", "dtype", "name_or_path", "_name_or_path", "num_labels", "id2label",
    "label2id", "per_layer_config", "sub_configs", "sub_configs_defaults", "transformers_weights", "fusion_config",
    "is_encoder_decoder", "is_decoder", "add_cross_attention", "layer_types", "rope_scaling", "rope_parameters",
    "text_config", "num_hidden_layers", "hidden_size", "vocab_size", "head_dim", "sliding_window", "hidden_act",
    "output_attentions", "output_hidden_states", "return_dict", "use_cache", "tie_word_embeddings", "chunk_size",
    "tie_last_hidden_states", "_component_names", "component_names", "problem_type", "max_position_embeddings",
    "bos_token_id", "pad_token_id", "pruned_heads", "architectures", "return_unused_kwargs", "kwargs", "",
]  # fmt: skip


class Hang(BaseException):
    """Raised by `guarded`: no handler of Exception swallows it."""


@contextlib.contextmanager
def guarded(seconds=30, kind=signal.SIGALRM, timer=signal.ITIMER_REAL):
    """Ends what runs longer; by the clock, or with SIGPROF and ITIMER_PROF by the time of the processor."""

    def stop(*_):
        raise Hang(f"longer than {seconds} s")

    before = signal.signal(kind, stop)
    signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        signal.setitimer(timer, 0)
        signal.signal(kind, before)


def fuzzed(examples):
    """Settings of a fuzz test of so many examples, or N times as many as FUZZ=N asks for.

    Without FUZZ it is a tenth of them, always the same ones; `test_fuzz_deep.py` is for all.

    The first that fails ends it, and its file is in `tmp_path` then.
    """
    more = int(os.environ.get("FUZZ", "0"))
    return settings(
        max_examples=examples * more or examples // 10,
        derandomize=not more,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.generate],  # making an example smaller would take minutes
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
    )


def outcome(run, *args, seconds=30):
    """True if `run` works, False if it refuses with a message. All else (other errors, a hang) gets out of here."""
    with guarded(seconds), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Transformers logs values as they are, and pytest-xdist cannot send half a surrogate pair on.
        logging.disable(logging.CRITICAL)
        try:
            run(*args)
        except ManticoreError as err:
            assert str(err).strip(), f"{type(err).__name__} without a message"
            assert len(str(err)) < 5000, f"a message of {len(str(err))} characters"
            return False
        finally:
            logging.disable(logging.NOTSET)
    return True


def slots(value):
    """[(container, key)] of everything inside a nested value."""
    found, todo = [], [value]
    while todo:
        one = todo.pop()
        items = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
        for key, inner in items:
            found.append((one, key))
            todo.append(inner)
    return found


def mutated(values, random, times=1, within=None):
    """A copy of nested dicts and lists with some of their values, keys or shapes changed.

    Args:
        values: The original, which stays as it is.
        random: What is drawn comes from here.
        times: Number of changes.
        within: Function from the copy to the part in which the changes are made; default: all of it.
    """
    values = copy.deepcopy(values)
    for _ in range(times):
        places = slots(within(values) if within else values)
        if places:
            container, key = random.choice(places)
            _change(container, key, places, random)
    return values


def _change(container, key, places, random):
    old, kind = container[key], random.randrange(12)
    if kind == 0:
        del container[key]
    elif kind in (1, 2, 3):
        container[key] = copy.deepcopy(random.choice(HOSTILE_VALUES))
    elif kind in (4, 5) and isinstance(old, (int, float)):
        container[key] = _near(old, random)
    elif kind == 6:
        container[key] = random.choice([[old], {"x": old}, str(old), [old, old], nested(random.choice([10, 40]))])
    elif kind == 7:  # a list for a dict and the reverse
        swapped = list(old.values()) if isinstance(old, dict) else None
        container[key] = dict(enumerate(old)) if isinstance(old, list) else swapped if swapped is not None else []
    elif kind == 8:
        other, name = random.choice(places)
        if name in other if isinstance(other, dict) else name < len(other):
            container[key] = copy.deepcopy(other[name])
    elif kind == 9 and isinstance(container, dict):  # another name
        container[random.choice([*HOSTILE_KEYS, *map(str, container)])] = container.pop(key)
    elif kind == 10 and isinstance(container, list):
        container.insert(key, copy.deepcopy(old))
    elif isinstance(container, dict):
        container[random.choice(HOSTILE_KEYS)] = copy.deepcopy(random.choice([old, *HOSTILE_VALUES]))
    else:
        container[key] = _near(old, random) if isinstance(old, (int, float)) else None


def _near(value, random):
    changes = [lambda x: x + 1, lambda x: x - 1, lambda x: x * 2, lambda x: -x, lambda x: x * 1000, float, str, bool]
    try:
        return random.choice(changes)(value)
    except OverflowError:
        return 1e308


def nested(depth):
    """A list in a list in a list."""
    value = []
    for _ in range(depth):
        value = [value]
    return value


def garbled(text, random, times=1):
    """A text with some of its characters cut, doubled, swapped or replaced."""
    for _ in range(times):
        start = random.randrange(len(text) + 1)
        stop = min(len(text), start + random.choice([1, 1, 2, 5, 40, 400]))
        piece = random.choice(
            [
                "",
                text[start:stop] * 2,
                "{",
                "}",
                "[",
                "]",
                ":",
                ",",
                '"',
                "\n",
                "  ",
                "- ",
                "&a ",
                "*a",
                "!!x ",
                "#",
                "\t",
                "\x00",
                "\ufeff",
                "é",
                "9" * 30,
                "1e999",
                "NaN",
                "[" * 2000,
                '{"a":' * 2000,
                "null",
                "<<: ",
            ]
        )
        text = text[:start] + piece + text[stop if random.randrange(2) else start :]
        if random.randrange(12) == 0:
            text = text[: random.randrange(len(text) + 1)]
    return text
