"""Pipelines and servers: a hybrid's answers there are those of `generate`, and what cannot serve it says so."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from manticore_hf_testing import ROOT
from tiny_hybrid import WORDS, mixed_hybrid, word_tokenizer
from transformers import AutoConfig, AutoTokenizer, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.import_utils import is_serve_available

from manticore_hf import (
    ManticoreError,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    ManticoreModel,
)

TEMPLATE = "{% for message in messages %}{{ message['role'] == 'user' and 'the' or 'a' }} {{ message['content'] }} "
TEMPLATE += "{% endfor %}{% if add_generation_prompt %}and {% endif %}"
# Of all lengths, from one word to three times the vocabulary
PROMPTS = ["cat", "the cat sat on a mat", " ".join(WORDS * 3), "two dogs", " ".join(WORDS), "run and saw the mat"]


def load_benchmark(name):
    """A script of `benchmarks/` as a module."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved hybrid of attention and Mamba in two blocks, with a tokenizer that has a chat template."""
    out = tmp_path_factory.mktemp("served") / "hybrid"
    tokenizer = word_tokenizer(chat_template=TEMPLATE, pad_token="<end>")
    model = mixed_hybrid(num_blocks=2)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def loaded(folder):
    return ManticoreForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


# ---- pipelines -------------------------------------------------------------------------------------------------------


def test_text_generation_in_batches(folder, loaded):
    generator = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    settings = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    texts = [
        [row[0]["generated_text"] for row in generator(PROMPTS, batch_size=size, **settings)] for size in (1, 4, 6)
    ]
    serving = load_benchmark("serving")
    assert texts[0] == texts[1] == texts[2] == [serving.offline(*loaded, prompt, 12) for prompt in PROMPTS]
    assert len(set(texts[0])) == len(PROMPTS) and {len(text.split()) for text in texts[0]} != {12}  # some end early


def test_chats_in_batches(folder, loaded):
    generator = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    chats[1] += [{"role": "assistant", "content": "a mat"}, {"role": "user", "content": "and a dogs"}]
    settings = {"max_new_tokens": 8, "do_sample": False}
    one, four = (
        [row[0]["generated_text"][-1] for row in generator(chats, batch_size=size, **settings)] for size in (1, 4)
    )
    assert one == four and {message["role"] for message in one} == {"assistant"}
    serving = load_benchmark("serving")
    assert one[0]["content"] == serving.offline(*loaded, PROMPTS[0], 8, chat=True)


@pytest.mark.parametrize("task", ["text-classification", "token-classification"])
def test_classification_in_batches(folder, loaded, task, tmp_path):
    cls = ManticoreForSequenceClassification if task == "text-classification" else ManticoreForTokenClassification
    model = cls.from_causal_lm(loaded[0], id2label={0: "bad", 1: "fair", 2: "good"})
    model.save_pretrained(tmp_path)
    loaded[1].save_pretrained(tmp_path)
    classify = pipeline(task, model=str(tmp_path), trust_remote_code=True)
    one, four = classify(PROMPTS, batch_size=1), classify(PROMPTS, batch_size=4)
    flat = [[row] if isinstance(row, dict) else row for row in (*one, *four)]
    assert len({label for row in flat for item in row for label in [item.get("label", item.get("entity"))]}) > 1
    for alone, batched in zip(flat[: len(PROMPTS)], flat[len(PROMPTS) :]):
        assert len(alone) == len(batched)
        for item, other in zip(alone, batched):
            assert item == {**other, "score": pytest.approx(other["score"], abs=1e-5)}
    with torch.no_grad():
        scores = model(**loaded[1](PROMPTS[0], return_tensors="pt")).logits.softmax(-1).flatten()
    assert flat[0][0]["score"] == pytest.approx(scores.max().item(), abs=1e-5)


# ---- what cannot serve a hybrid --------------------------------------------------------------------------------------


def test_continuous_batching_is_refused(loaded):
    model, _ = loaded
    before = model.config._attn_implementation
    with pytest.raises(ManticoreError, match="Continuous batching .* no recurrent states"):
        model.generate_batch([[1, 2], [3]], max_new_tokens=2)
    with pytest.raises(ManticoreError, match="Continuous batching"), model.continuous_batching_context_manager():
        pass
    assert not hasattr(model, "init_continuous_batching") and model.config._attn_implementation == before


@pytest.mark.parametrize(
    "cls", [ManticoreModel, ManticoreForCausalLM, ManticoreForSequenceClassification, ManticoreForTokenClassification]
)
def test_engines_with_attention_of_their_own_are_told(cls):
    """What vLLM and SGLang ask a class of remote code before they use it; after False, both go on.

    Others ask to choose a way of their own (sentence-transformers), and get the answer.
    """
    assert not cls._supports_attention_backend and cls.is_backend_compatible() is False
    for name, raises in (("vllm.model_executor", True), ("sglang", True), ("sentence_transformers.base", False)):
        asking = {"__name__": name, "cls": cls}
        exec("def asks():\n    return cls.is_backend_compatible()", asking)
        if raises:
            with pytest.raises(ManticoreError, match=f"{name.split('.')[0]} keeps .* cannot run in that engine"):
                asking["asks"]()
        else:
            assert asking["asks"]() is False


@pytest.mark.parametrize("name", ["paged|eager", "vllm", "sglang"])
def test_the_attention_of_engines_is_refused(folder, loaded, monkeypatch, name):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, name, None)  # the engine registers it
    with pytest.raises(ManticoreError, match="a hybrid cannot run in that engine"):
        loaded[0].set_attn_implementation(name)
    config = AutoConfig.from_pretrained(folder)
    config._attn_implementation = name  # as vLLM and SGLang do it, before they make the model
    with pytest.raises(ManticoreError, match="a hybrid cannot run in that engine"):
        ManticoreModel(config)


# ---- transformers serve ----------------------------------------------------------------------------------------------

needs_server = pytest.mark.skipif(not is_serve_available(), reason="pip install 'manticore-hf[serve]'")


@needs_server
def test_continuous_batching_falls_back_to_generate(loaded):
    from transformers.cli.serving.model_manager import Modality
    from transformers.cli.serving.utils import GenerateManager, GenerationState

    state = GenerationState(continuous_batching=True)
    assert state.use_continuous_batching(loaded[0], Modality.LLM) is False
    assert isinstance(state.get_manager("hybrid", use_cb=False), GenerateManager)


@pytest.mark.slow
@needs_server
def test_the_server_answers_what_generate_answers(hub, owner, folder, loaded, tmp_path):
    """A directory and a repository, both by their own code, under requests of mixed lengths at the same time."""
    serving = load_benchmark("serving")
    hub.add_repo(f"{owner}/hybrid", folder)
    jobs = [
        (str(folder) if i % 2 else f"{owner}/hybrid", prompt, 3 + 5 * (i % 3), chat, stream)
        for i, (chat, stream) in enumerate([(False, False), (True, False), (False, True), (True, True)])
        for prompt in PROMPTS
    ]
    jobs += [(f"{owner}/hybrid", *job[1:]) for job in jobs[6:9]]
    with serving.Server(tmp_path, "--continuous-batching") as server, ThreadPoolExecutor(6) as clients:
        answers = list(clients.map(lambda job: server.ask(*job), jobs))
        asked = {"input": PROMPTS[1], "temperature": 0, "max_output_tokens": 9, "stream": False}
        (response,) = server.post("responses", model=str(folder), **asked)
    wanted = [serving.offline(*loaded, *job[1:4]) for job in jobs]
    assert answers == wanted
    assert response["output"][0]["content"][0]["text"] == serving.offline(*loaded, PROMPTS[1], 9, chat=True)
    log = server.log.read_text()
    assert "does not support continuous batching. Falling back to sequential generation." in log
    assert "Traceback" not in log and log.count("] Loading ") == 2  # each of the two once
