"""Compose and calibrate as commands; calibration where it was asked for and not done; what a search leaves fixed."""

import json
import os
import signal
import time

import clean_process
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from test_train import _run, start  # noqa: F401  (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM, set_stage
from manticore_hf.cli import main
from manticore_hf.evaluation.data import DataArguments
from manticore_hf.training.calibrate import awaits_calibration, calibrate_projectors
from manticore_hf.training.freezing import fix_alpha
from manticore_hf.training.runtime import finished, last_whole_checkpoint
from manticore_hf.training.trained_stages import StageArguments, run_stage
from manticore_hf.training.untrained_stages import run_compose


@pytest.fixture(scope="module")
def parts(start, tmp_path_factory):  # noqa: F811
    """The components of the tiny hybrid as directories with its tokenizer."""
    folder, hybrid = tmp_path_factory.mktemp("parts"), ManticoreForCausalLM.from_pretrained(start / "hybrid")
    for name in hybrid.config.component_names:
        hybrid.component(name).save_pretrained(folder / name)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name / file).write_bytes((start / "hybrid" / file).read_bytes())
    return [str(folder / name) for name in hybrid.config.component_names]


def _cli(*arguments):
    return ["-m", "manticore_hf.cli", *map(str, arguments)]


def _kill_after(command, seconds):
    process = clean_process.start(command)
    time.sleep(seconds)
    if process.poll() is None:
        os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_compose_takes_every_setting(parts, tmp_path, capsys):
    command = [
        "compose", *parts, "--output_dir", str(tmp_path), "--num_blocks", "2", "--projector", "mlp", "--mixture",
        "static", "--block_layers", '{"mamba": [1, 1]}', "--component_loss_weight", "0.5", "--seed", "7",
        "--per_device_train_batch_size", "4",
    ]  # fmt: skip
    assert main(command) == 0
    config = ManticoreForCausalLM.from_pretrained(tmp_path).config
    assert (config.num_blocks, config.projector, config.mixture) == (2, "mlp", "static")
    assert config.component_loss_weight == 0.5 and config.projector_init == "identity"
    said = capsys.readouterr().out
    assert "2 blocks" in said and f"measure it with: manticore-hf evaluate --model {tmp_path} --data TEXT.txt\n" in said
    assert main(command) == 0 and "this stage is finished" in capsys.readouterr().out
    assert main(["compose", *parts, "--output_dir", str(tmp_path / "x"), "--block_layers", "{"]) == 2
    assert "block_layers='{' is not JSON" in capsys.readouterr().err
    assert main(["compose", *parts, "--output_dir", str(tmp_path / "x"), "--gate", "beta"]) == 2
    assert "gate='beta' is unknown" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_compose_and_calibrate_end_where_uninterrupted_ones_do(parts, start, tmp_path):  # noqa: F811
    def commands(folder):
        hybrid, calibrated = folder / "hybrid", folder / "calibrated"
        compose = _cli("compose", *parts, "--num_blocks", 2, "--mixture", "static", "--output_dir", hybrid)
        calibrate = _cli(
            "calibrate",
            "--model",
            hybrid,
            "--data",
            start / "text.txt",
            "--block_size",
            16,
            "--tokens",
            1000,
            "--per_device_train_batch_size",
            4,
            "--output_dir",
            calibrated,
        )
        return compose, calibrate

    begun = time.time()
    for command in commands(tmp_path / "whole"):
        done = _run(command)
    whole = (time.time() - begun) / 2
    assert "R^2" in done.stdout and "reference" in done.stdout
    for command, folder in zip(commands(tmp_path / "killed"), ("hybrid", "calibrated")):
        for share in (0.7, 0.9):  # the import of torch takes the first half
            _kill_after(command, share * whole)
            written = tmp_path / "killed" / folder
            assert not (written / "stage.json").exists() or ManticoreForCausalLM.from_pretrained(written)
        _run(command)
    for folder in ("hybrid", "calibrated"):
        one, two = (load_file(tmp_path / side / folder / "model.safetensors") for side in ("whole", "killed"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
        results = [json.loads((tmp_path / side / folder / "stage.json").read_text()) for side in ("whole", "killed")]
        assert results[0] == results[1]


def test_components_may_be_models(parts, tmp_path, capsys):  # noqa: F811
    """Then the tokenizer is that of the directory which the model came from, if it came from one."""
    arguments = {"report_to": "none", "use_cpu": True}
    wanted = AutoTokenizer.from_pretrained(parts[0]).get_vocab()
    models = [AutoModelForCausalLM.from_pretrained(part) for part in parts]
    for name, given in (
        ("models", models),
        ("specs", [ComponentSpec(model, name=n) for n, model in zip("ab", models)]),
    ):
        result = run_compose(given, TrainingArguments(str(tmp_path / name), **arguments), num_blocks=1)
        assert AutoTokenizer.from_pretrained(tmp_path / name).get_vocab() == wanted
        assert result["parameters"] == ManticoreForCausalLM.from_pretrained(tmp_path / name).num_parameters()
    drawn = [type(model)(model.config) for model in models]
    for model in drawn:
        model.config._name_or_path = model.name_or_path = ""
    run_compose(drawn, TrainingArguments(str(tmp_path / "drawn"), **arguments), num_blocks=1)
    assert "No tokenizer was saved: " in capsys.readouterr().err
    assert not (tmp_path / "drawn" / "tokenizer.json").exists()


def test_a_stage_calibrates_what_was_composed_for_it(parts, start, tmp_path, capsys):  # noqa: F811
    arguments = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    hybrid = tmp_path / "hybrid"
    run_compose(parts, TrainingArguments(output_dir=str(hybrid), **arguments), num_blocks=2)
    fresh = ManticoreForCausalLM.from_pretrained(hybrid)
    assert awaits_calibration(fresh) and fresh.config.projector_init == "calibrated"
    data = DataArguments(data=str(start / "text.txt"), block_size=16)
    training = TrainingArguments(output_dir=str(tmp_path / "out"), max_steps=1, learning_rate=0.0, **arguments)
    run_stage("pretrain", StageArguments(str(hybrid)), data, training)
    assert "Projectors calibrated on" in capsys.readouterr().out
    found = ManticoreForCausalLM.from_pretrained(tmp_path / "out")
    assert not awaits_calibration(found) and found.config.calibration["reference"] in found.config.component_names
    other = next(n for n in found.config.component_names if n != found.config.reference_component)
    projector = found.hybrid_mixer.into[f"{other}-1"]
    assert (projector.weight - torch.eye(*projector.weight.shape)).abs().max() > 1e-3
    # one block with native embeddings has no projectors, and other kinds have no closed form
    for settings in ({"num_blocks": 1}, {"num_blocks": 2, "projector": "mlp"}, {"num_blocks": 2, "preset": "paper"}):
        assert not awaits_calibration(ManticoreForCausalLM.from_components(parts, **settings))


def test_a_stage_shows_one_bar_and_logs_to_a_file(parts, start, tmp_path, capfd):  # noqa: F811
    data = DataArguments(data=str(start / "text.txt"), block_size=16)
    for verbose in (False, True):
        settings = {"output_dir": str(tmp_path / f"out-{verbose}"), "max_steps": 3, "logging_steps": 1, "use_cpu": True}
        training = TrainingArguments(**settings, report_to="none", save_strategy="no", disable_tqdm=False)
        run_stage("pretrain", StageArguments(str(start / "hybrid"), verbose=verbose), data, training)
        said, log = capfd.readouterr(), tmp_path / f"out-{verbose}" / "training.log"
        assert ("{'loss'" in said.out + said.err) == verbose and log.is_file() != verbose
        assert ("pretrain: 100%" in said.err and "3/3" in said.err and "loss=" in said.err) != verbose
    steps = [json.loads(line) for line in (tmp_path / "out-False" / "training.log").read_text().splitlines()]
    state = json.loads((tmp_path / "out-False" / "trainer_state.json").read_text())
    assert [one["step"] for one in steps] == [1, 2, 3, 3]
    assert [one["loss"] for one in steps[:3]] == [one["loss"] for one in state["log_history"][:3]]


def test_a_damaged_result_of_a_run_is_a_sentence(tmp_path):
    """A disk was full, or it is another's file: nothing is taken for finished."""
    for text, said in (
        ('{"stage": "pre', "stage.json' is damaged .*delete it"),
        ("[" * 100_000, "stage.json' is damaged .*delete it"),
        ("\udcff", "stage.json' is damaged .*delete it"),
        ("[1]", "stage.json' holds a list, no dict"),
    ):
        (tmp_path / "stage.json").write_text(text, encoding="utf-8", errors="surrogateescape")
        with pytest.raises(ManticoreError, match=said):
            finished(tmp_path)
    (tmp_path / "stage.json").write_text('{"stage": "pretrain"}')
    assert finished(tmp_path) == {"stage": "pretrain"}
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    for text, found in (('{"global_step": 3', None), ("[]", None), ('{"global_step": 3}', str(checkpoint))):
        (checkpoint / "trainer_state.json").write_text(text)
        assert last_whole_checkpoint(tmp_path) == found


def test_rows_of_different_lengths_calibrate(parts):
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2)
    rows = [list(range(2, 2 + length)) for length in (3, 9, 5, 7) * 40]
    dataset = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(r) for r in rows], "labels": rows})
    found = calibrate_projectors(model, dataset, tokens=600)
    assert found.tokens >= 600 and not awaits_calibration(model)


def test_fixing_alpha_leaves_the_gate_of_a_token_mixture(parts):
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2)
    with torch.no_grad():
        model.hybrid_mixer.alpha_logits[0] = torch.tensor([0.0, 2.0])
        model.hybrid_mixer.token_gate.linear.weight.normal_()
    model.eval()
    ids = torch.randint(2, 12, (2, 9))
    before, alpha = model(ids), model.mixture_weights()
    fix_alpha(model)
    after = model(ids)
    assert model.config.mixture_weights[1] is None
    torch.testing.assert_close(model.mixture_weights(), alpha)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-5, rtol=0)
    assert torch.allclose(after.weights, before.weights, atol=1e-5) and after.weights.std() > 0.01
    again = type(model.config).from_dict(model.config.to_dict())
    assert again.mixture_weights == model.config.mixture_weights
    model.set_mixture_weights([None, None])
    assert model.config.mixture_weights is None
    with pytest.raises(ManticoreError, match="or None for a block"):
        model.set_mixture_weights([None])
    single = ManticoreForCausalLM.from_components(parts)
    assert fix_alpha(single).config.mixture_weights is None


def test_a_search_over_blocks_hands_its_gate_to_the_finetuning(parts, start, tmp_path):  # noqa: F811
    from manticore_hf.training.search import SearchArguments

    arguments = {"report_to": "none", "use_cpu": True, "save_strategy": "no", "disable_tqdm": True, "max_steps": 4}
    model = ManticoreForCausalLM.from_components(parts, num_blocks=2, projector_init="identity")
    model.save_pretrained(tmp_path / "hybrid")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "hybrid" / file).write_bytes((start / "hybrid" / file).read_bytes())
    data = DataArguments(data=str(start / "text.txt"), block_size=16)
    search = SearchArguments(
        output_dir=str(tmp_path / "searched"), learning_rate=0.01, alpha_learning_rate=0.2, **arguments
    )
    run_stage("search", StageArguments(str(tmp_path / "hybrid")), data, search)
    searched = ManticoreForCausalLM.from_pretrained(tmp_path / "searched")
    tune = TrainingArguments(output_dir=str(tmp_path / "tuned"), learning_rate=0.0, **arguments)
    begin = StageArguments(str(tmp_path / "hybrid"), mixture_from=str(tmp_path / "searched"))
    run_stage("finetune", begin, data, tune)
    tuned = ManticoreForCausalLM.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(tuned.mixture_weights(), searched.mixture_weights())
    assert (tuned.mixture_weights()[0] - 0.5).abs().max() > 0.01 and tuned.config.mixture_weights[1] is None
    gate = "token_gate.linear.weight"
    torch.testing.assert_close(tuned.hybrid_mixer.get_parameter(gate), searched.hybrid_mixer.get_parameter(gate))
    assert torch.equal(tuned.component("mamba").lm_head.weight, model.component("mamba").lm_head.weight)


def test_new_embeddings_are_trained_with_the_projectors(parts):
    model = set_stage(ManticoreForCausalLM.from_components(parts, preset="paper", embeddings="fresh"), "projectors")
    trained = {name for name, p in model.named_parameters() if p.requires_grad and not name.startswith("hybrid_mixer")}
    expected = {"gpt_neox.gpt_neox.embed_in.weight", "gpt_neox.lm_head.weight", "mamba.backbone.embeddings.weight"}
    assert trained - {"mamba.lm_head.weight"} == expected
    assert not any(p.requires_grad for p in set_stage(model, "projectors").mamba.backbone.layers.parameters())


def test_embeddings_drawn_anew_before_a_stage(parts, start, tmp_path, capsys):  # noqa: F811
    """For search and finetune, as the paper's code does: of N(0, 0.02), and a head that was tied stays tied."""
    settings = {"preset": "paper", "embeddings": "fresh", "dtype": "float32"}
    arguments = TrainingArguments(output_dir=str(tmp_path / "fresh"), report_to="none", use_cpu=True)
    run_compose(parts, arguments, **settings)
    common = ["--data", str(start / "text.txt"), "--block-size", "16", "--max-steps", "1", "--learning-rate", "0"]
    common += ["--seed", "5", "--use-cpu", "true", "--validation-fraction", "0"]
    before = ManticoreForCausalLM.from_pretrained(tmp_path / "fresh")
    for stage in ("search", "finetune"):
        command = [stage, "--model", str(tmp_path / "fresh"), "--output-dir", str(tmp_path / stage), *common]
        assert main([*command, "--new-embeddings"]) == 0
        after = ManticoreForCausalLM.from_pretrained(tmp_path / stage)
        changed = {key for key, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[key])}
        alpha = {"hybrid_mixer.alpha_logits"} & changed
        ends = {"gpt_neox.gpt_neox.embed_in.weight", "gpt_neox.lm_head.weight", "mamba.backbone.embeddings.weight"}
        assert changed - alpha == ends | {"mamba.lm_head.weight"}
        for key in ends:
            weight = after.get_parameter(key).detach()
            assert abs(weight.mean()) < 0.005 and weight.std() == pytest.approx(0.02, rel=0.2)
        assert torch.equal(after.mamba.lm_head.weight, after.mamba.backbone.embeddings.weight)
        assert not torch.equal(after.gpt_neox.lm_head.weight, after.gpt_neox.gpt_neox.embed_in.weight)
    capsys.readouterr()
    command = ["finetune", "--model", str(start / "hybrid"), "--output-dir", str(tmp_path / "none"), *common]
    assert main([*command, "--new-embeddings"]) == 2
    assert "new_embeddings is for a hybrid with embeddings 'fresh'" in capsys.readouterr().err


def test_evaluate_prints_the_baselines(start, tmp_path, capsys):  # noqa: F811
    command = ["evaluate", "--model", str(start / "hybrid"), "--data", str(start / "text.txt"), "--block-size", "16"]
    assert main([*command, "--max-tokens", "800", "--output-dir", str(tmp_path)]) == 0
    out, losses = capsys.readouterr().out, json.loads((tmp_path / "evaluation.json").read_text())["losses"]
    assert list(losses) == ["gpt_neox", "mamba", "ensemble", "online mixture", "hybrid"] and "800 tokens" in out
    for name, loss in losses.items():
        assert name in out and f"{loss:.4f}" in out
