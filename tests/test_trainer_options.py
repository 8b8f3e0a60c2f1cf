"""What TrainingArguments change of the computation: on a hybrid of one component as on the component alone.

Hybrids of several components have no plain twin; there the same is computed by hand.
"""

import copy
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from tiny_hybrid import QUIET, mixed_hybrid, neox, rows_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator, training_args
from transformers.integrations.neftune import activate_neftune, deactivate_neftune

from manticore_hf import ComponentSpec, ManticoreError, ManticoreForCausalLM, ManticoreForSequenceClassification


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of one component and of the hybrid made of it."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("saved")
    model = neox()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(place / "plain")
    ManticoreForCausalLM.from_components([ComponentSpec(place / "plain", name="one")]).save_pretrained(place / "hybrid")
    return {"plain": place / "plain", "hybrid": place / "hybrid"}


def rows():
    """Rows with different numbers of labels: means over tokens and over batches differ."""
    drawn = rows_of(12).to_dict()
    drawn["labels"] = [[-100] * (i % 7) + ids[i % 7 :] for i, ids in enumerate(drawn["labels"])]
    drawn["attention_mask"] = [[1] * len(ids) for ids in drawn["input_ids"]]
    return rows_of(12).from_dict(drawn)


def trained(model, folder, metrics=None, **settings):
    """What a training of three steps and an evaluation give, apart from times."""
    values = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "learning_rate": 0.1,
        "optim": "sgd",
        **QUIET,
    }
    args = TrainingArguments(str(folder), **{**values, **settings})
    torch.manual_seed(0)
    trainer = Trainer(
        model,
        args,
        train_dataset=rows(),
        eval_dataset=rows(),
        data_collator=default_data_collator,
        compute_metrics=metrics,
    )
    trainer.train()
    found = {**trainer.evaluate(), "rows": trainer.state.train_batch_size}
    times = ("runtime", "per_second")
    found["train"] = [
        {k: v for k, v in one.items() if not k.endswith(times)}
        for one in trainer.state.log_history
        if "loss" in one or "eval_loss" in one
    ]
    found = {key: value for key, value in found.items() if not key.endswith(times)}
    return found, dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())


class Metrics:
    """Reads all that the Trainer hands over."""

    def __init__(self):
        self.batches = []

    def __call__(self, prediction, compute_result=True):
        logits, labels = (
            np.concatenate(one) if isinstance(one, list) else one
            for one in (prediction.predictions, prediction.label_ids)
        )
        known = labels[:, 1:] != -100
        right = logits[:, :-1].argmax(-1) == labels[:, 1:]
        self.batches.append(float((right & known).sum() / known.sum()))
        extra = {"inputs": prediction.inputs, "losses": prediction.losses}
        sums = {key: float(abs(value).sum()) for key, value in extra.items() if value is not None}
        return {"accuracy": sum(self.batches) / len(self.batches), **sums} if compute_result else {}


QUICK = {
    "label smoothing, in micro-batches": {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2,
                                          "per_device_train_batch_size": 2},
    "NEFTune": {"neftune_noise_alpha": 5.0},
    "micro-batches, each a mean, checkpointed": {
        "average_tokens_across_devices": False, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2,
        "gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "bf16": {"bf16": True, "bf16_full_eval": True},
    "metrics": {"metrics": True, "include_for_metrics": ["inputs", "loss"], "use_cache": True},
}  # fmt: skip
SLOW = {
    "nothing": {},
    "label smoothing": {"label_smoothing_factor": 0.2},
    "micro-batches": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "checkpointing of some layers": {"activation_checkpointing": True,
                                     "activation_checkpointing_kwargs": {"every_n_layers": 2}},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager", "torch_compile_mode": "default"},
    "clipping and decay": {"max_grad_norm": 0.01, "weight_decay": 0.3, "optim": "adafactor", "learning_rate": 1e-3},
    "AdamW": {"optim": "adamw_torch", "adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 0.1},
    "RMSprop": {"optim": "rmsprop", "learning_rate": 1e-4},
    "scheduled": {"max_steps": -1, "num_train_epochs": 1, "lr_scheduler_type": "cosine_with_min_lr", "warmup_steps": 1,
                  "lr_scheduler_kwargs": {"min_lr": 0.01}},
    "other rows": {"seed": 7, "data_seed": 3, "dataloader_drop_last": True, "per_device_train_batch_size": 5},
    "in their order": {"train_sampling_strategy": "sequential"},
    "all columns": {"remove_unused_columns": False, "label_names": ["labels"]},
    "evaluated on the way": {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "eval_delay": 2},
    "evaluated in lists": {"metrics": True, "eval_do_concat_batches": False, "eval_use_gather_object": True},
    "looked through": {"debug": "underflow_overflow", "torch_empty_cache_steps": 1, "tf32": False},
    "tokens seen": {"include_num_input_tokens_seen": "non_padding"},
    "sorted by length": {"train_sampling_strategy": "group_by_length"},
    "metrics by batch": {"metrics": True, "batch_eval_metrics": True, "eval_accumulation_steps": 1},
    "losses only": {"prediction_loss_only": True},
    "evaluation in fp16": {"fp16_full_eval": True},
}  # fmt: skip
PROJECTED = "rank=4,update_proj_gap=2,scale=0.25"
OF_PACKAGES = {  # no extra installs liger-kernel, which brings Triton along
    "galore_torch": {
        "GaLore": {"optim": "galore_adamw", "optim_target_modules": "all-linear", "optim_args": PROJECTED},
        "GaLore by names": {"optim": "galore_adamw", "optim_target_modules": ["attention", "mlp"],
                            "optim_args": PROJECTED},
        "GaLore by layers": {"optim": "galore_adamw_layerwise", "optim_target_modules": [r".*mlp.*"],
                             "optim_args": PROJECTED}},
    "apollo_torch": {  # its random projections differ by a parameter's place in its group
        "APOLLO": {"optim": "apollo_adamw", "optim_target_modules": ["mlp"],
                   "optim_args": PROJECTED + ",proj=svd,scale_type=channel"}},
    "liger_kernel": {
        "Liger": {"use_liger_kernel": True, "liger_kernel_config": {"rope": True, "cross_entropy": False}},
        "Liger, losses only": {"use_liger_kernel": True, "prediction_loss_only": True}},
}  # fmt: skip


def agree(found, right, name, tolerance=2e-5):
    assert found.keys() == right.keys(), name
    for key, value in right.items():
        if isinstance(value, list):
            assert len(value) == len(found[key])
            for a, b in zip(found[key], value):
                agree(a, b, name, tolerance)
        else:
            assert found[key] == pytest.approx(value, abs=tolerance, rel=tolerance), (name, key)


@pytest.mark.parametrize("options", [QUICK, pytest.param(SLOW, marks=pytest.mark.slow)])
def test_every_option_does_on_a_hybrid_what_it_does_on_its_component(saved, tmp_path, options):
    compare_with_the_component(saved, tmp_path, options, usual="nothing" if "nothing" in options else "metrics")


def compare_with_the_component(saved, tmp_path, options, usual):
    losses = {}
    for name, settings in options.items():
        out = {}
        for kind, folder in saved.items():
            own = {**settings, "metrics": Metrics() if "metrics" in settings else None}
            out[kind] = trained(AutoModelForCausalLM.from_pretrained(folder), tmp_path, **own)
        tolerance = 2e-3 if "f16" in name or "fp16" in name else 2e-5
        agree(out["hybrid"][0], out["plain"][0], name, tolerance)
        for key, value in out["plain"][1].items():
            mine = out["hybrid"][1][f"one.{key}"]
            torch.testing.assert_close(mine, value, atol=tolerance, rtol=tolerance, msg=f"{name} {key}")
        losses[name] = [one["loss"] for one in out["plain"][0]["train"] if "loss" in one][-1]
    changing = [name for name in losses if name.startswith(("label", "NEFTune", "clipping", "GaLore", "APOLLO"))]
    assert all(losses[name] != pytest.approx(losses[usual], abs=1e-5) for name in changing), losses


@pytest.mark.slow
@pytest.mark.parametrize("package", OF_PACKAGES)
def test_options_that_need_a_package(saved, tmp_path, package):
    pytest.importorskip(package)
    compare_with_the_component(saved, tmp_path, {"plainly": {}, **OF_PACKAGES[package]}, usual="plainly")


def test_half_precision(saved):
    """Three steps under autocast with scaled gradients, as `fp16=True` takes them where there is an accelerator."""
    found, batch = {}, default_data_collator(list(rows())[:4])
    for kind, folder in saved.items():
        model = AutoModelForCausalLM.from_pretrained(folder).train()
        optimizer, scaler = torch.optim.SGD(model.parameters(), 0.1), torch.amp.GradScaler("cpu", init_scale=256.0)
        losses = []
        torch.manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.float16):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        found[kind] = losses, dict(model.named_parameters())
    assert found["hybrid"][0] == pytest.approx(found["plain"][0], abs=2e-3)
    assert found["plain"][0][0] != pytest.approx(found["plain"][0][2], abs=1e-2)
    for key, value in found["plain"][1].items():
        torch.testing.assert_close(found["hybrid"][1][f"one.{key}"], value, atol=2e-3, rtol=2e-3, msg=key)


@pytest.fixture
def restored(monkeypatch):
    """What options change of the whole process is as it was afterwards."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    kept = torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = kept
    torch.backends.fp32_precision = "none"
    training_args.enable_tf32.cache_clear()


def test_full_determinism(tmp_path, restored):
    """No part of a hybrid needs what has no deterministic way, and nothing is drawn: the same as without."""
    way = {"num_blocks": 2, "embeddings": "mixed"}
    usual, determined = (trained(mixed_hybrid(**way), tmp_path, full_determinism=full) for full in (False, True))
    assert torch.are_deterministic_algorithms_enabled()
    agree(determined[0], usual[0], "full_determinism")
    for key, value in usual[1].items():
        torch.testing.assert_close(determined[1][key], value, atol=2e-5, rtol=2e-5, msg=key)


def test_tf32(saved, tmp_path, restored, monkeypatch):
    """On a CPU Transformers refuses it, whatever the model; the switch reaches a hybrid as it does its component."""
    if torch.cuda.is_available():
        pytest.skip("here it is taken")
    with pytest.raises(ValueError, match="--tf32 requires Ampere"):
        TrainingArguments(str(tmp_path), tf32=True, **QUIET)
    monkeypatch.setattr(training_args, "is_torch_tf32_available", lambda: True)
    compare_with_the_component(saved, tmp_path, {"tf32": {"tf32": True}}, usual="tf32")
    assert torch.backends.fp32_precision == "tf32"


def run_out_of_memory(model, most, after=0):
    """A layer of a model fails as it does on a full device: with more rows than `most`, from call `after` on."""
    calls = []

    def check(module, args, kwargs):
        calls.append(len(args[0] if args else kwargs["hidden_states"]))
        if calls[-1] > most and len(calls) > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    layer = next(one for name, one in model.named_modules() if name.endswith("neox.layers.1"))
    layer.register_forward_pre_hook(check, with_kwargs=True)
    return model


def test_auto_find_batch_size(saved, tmp_path):
    """From the first step on as if it had begun with the batch that fits; later, as the component alone."""
    finds, found = {"auto_find_batch_size": True, "per_device_train_batch_size": 5}, {}
    for kind, folder in saved.items():
        for after in (0, 1):
            model = run_out_of_memory(AutoModelForCausalLM.from_pretrained(folder), 4, after)
            found[kind, after] = trained(model, tmp_path, **finds)
        found[kind, "fits"] = trained(AutoModelForCausalLM.from_pretrained(folder), tmp_path)
    for mine, right in (
        (("hybrid", 0), ("hybrid", "fits")),
        (("plain", 0), ("plain", "fits")),
        (("hybrid", 0), ("plain", 0)),
        (("hybrid", 1), ("plain", 1)),
    ):
        assert found[mine][0]["rows"] == 4
        agree(found[mine][0], found[right][0], mine)
        for key, value in found[right][1].items():
            name = key if mine[0] == right[0] else f"one.{key}"
            torch.testing.assert_close(found[mine][1][name], value, atol=2e-5, rtol=2e-5, msg=key)
    first = [found["plain", after][0]["train"][0]["loss"] for after in (0, 1)]
    assert first[0] != pytest.approx(first[1], abs=1e-4)  # the first step of five rows was taken


def test_parts_of_rows_are_refused(monkeypatch):
    """What accelerate knows where a `parallelism_config` asks for context or sequence parallelism."""
    model = mixed_hybrid()
    for sizes, told in (
        ({"cp_size": 2}, "cp_size=2"),
        ({"sp_size": 2, "sp_backend": "deepspeed"}, "sp_size=2"),
        ({"tp_size": 2}, None),
        ({"dp_replicate_size": 2}, None),
    ):
        monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(**sizes))
        if told is None:
            assert model.train().training and not model.eval().training
            continue
        for mode in (model.train, model.eval):
            with pytest.raises(ManticoreError, match=f"{told}: each process would get a part of every row"):
                mode()


# Of no influence on what is computed: what is logged, saved, uploaded and printed, how rows are loaded, devices joined
BESIDE_THE_MODEL = """
    output_dir logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter log_level log_level_replica
    disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id save_only_model
    save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint push_to_hub hub_token
    hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision ignore_data_skip length_column_name
    restore_callback_states_from_checkpoint use_cpu accelerator_config dataloader_num_workers dataloader_pin_memory
    dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    ddp_backend ddp_timeout skip_memory_metrics do_train do_eval do_predict local_rank
""".split()
ELSEWHERE = {
    "test_trainer.py": ["load_best_model_at_end", "metric_for_best_model", "resume_from_checkpoint"],
    "test_stages.py": ["greater_is_better"],
    "test_deepspeed.py": ["deepspeed"],
    "distributed_cases.py": [
        "fsdp",
        "fsdp_config",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
    ],
}


def test_no_option_is_left_out():
    """Each is of a test, or changes nothing that is computed; one that a new Transformers brings is to be looked at."""
    here, names = Path(__file__), {one.name for one in dataclasses.fields(TrainingArguments)}
    tested = {**ELSEWHERE, here.name: sorted(names - {*BESIDE_THE_MODEL, *sum(ELSEWHERE.values(), [])})}
    for file, options in tested.items():
        text = (here.parent / file).read_text()
        lacking = [one for one in options if f'"{one}"' not in text and f"{one}=" not in text]
        assert not lacking, (file, lacking)
    assert names > {*BESIDE_THE_MODEL, *sum(ELSEWHERE.values(), [])}


# ---- hybrids of several components, by hand --------------------------------------------------------------------------

WAYS = ({}, {"num_blocks": 2}, {"embeddings": "mixed", "num_blocks": 2, "gate": "alpha"})


def collated():
    return default_data_collator(list(rows())[:4])


def quiet(folder, **settings):
    return TrainingArguments(str(folder), **{**QUIET, **settings})


def test_smoothed_labels_are_those_of_the_next_token(tmp_path):
    """The mixture's; also of a class that FSDP2 has renamed."""
    batch = collated()
    for way in WAYS:
        model = mixed_hybrid(**way, component_loss_weight=1.0)
        with torch.no_grad():
            logp = model(batch["input_ids"]).logits[:, :-1].log_softmax(-1)
        known, labels = batch["labels"][:, 1:] != -100, batch["labels"][:, 1:].clamp(min=0)
        each = -0.8 * logp.gather(-1, labels[..., None])[..., 0] - 0.2 * logp.mean(-1)
        trainer = Trainer(model, quiet(tmp_path, label_smoothing_factor=0.2))
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), (each * known).sum() / known.sum())
        split = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(7))
        torch.testing.assert_close(split, (each * known).sum() / 7)
        model.__class__ = type("FSDPManticoreForCausalLM", (type(model),), {})
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), (each * known).sum() / known.sum())


def test_a_loss_of_the_users_own(tmp_path):
    """It gets the mixture's logits, and is all that is minimised: three steps by hand."""

    def focal(outputs, labels, num_items_in_batch=None):
        logp = outputs.logits[:, :-1].log_softmax(-1)
        known, labels = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
        each = logp.gather(-1, labels[..., None])[..., 0]
        return -(each * (1 - each.exp()) * known).sum() / (known.sum() if num_items_in_batch is None else 12)

    for way in WAYS:
        model = mixed_hybrid(**way, component_loss_weight=1.0, mix_loss_weight=0.3)
        twin = copy.deepcopy(model).train()
        args = quiet(
            tmp_path,
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=0.1,
            optim="sgd",
            max_grad_norm=0,
            lr_scheduler_type="constant",
            train_sampling_strategy="sequential",
        )
        trainer = Trainer(
            model, args, train_dataset=rows(), data_collator=default_data_collator, compute_loss_func=focal
        )
        trainer.train()
        optimizer = torch.optim.SGD(twin.parameters(), 0.1)
        for at in (0, 4, 8):
            batch = default_data_collator(list(rows())[at : at + 4])
            optimizer.zero_grad()
            focal(twin(batch["input_ids"]), batch["labels"], 12).backward()
            optimizer.step()
        for key, value in twin.named_parameters():
            torch.testing.assert_close(dict(model.named_parameters())[key], value, atol=1e-5, rtol=1e-4, msg=key)


def test_neftunes_noise_is_in_what_the_components_read(tmp_path):
    batch = collated()
    for way in WAYS:
        model = mixed_hybrid(**way)
        embedding = model.get_input_embeddings()
        embeds = embedding(batch["input_ids"])
        bound = 5.0 / (embeds.shape[1] * embeds.shape[2]) ** 0.5
        hook = activate_neftune(model, 5.0)
        model.train()
        torch.manual_seed(2)
        loss = model(**batch).loss
        torch.manual_seed(2)
        noise = torch.zeros_like(embeds).uniform_(-bound, bound)
        rest = {key: value for key, value in batch.items() if key != "input_ids"}
        hook_free = copy.deepcopy(model)
        hook_free.get_input_embeddings()._forward_hooks.clear()
        torch.testing.assert_close(loss, hook_free(inputs_embeds=embeds + noise, **rest).loss)
        assert abs(loss - hook_free(**batch).loss) > 1e-3
        torch.testing.assert_close(model.eval()(**batch).loss, hook_free.eval()(**batch).loss)  # not in evaluation
        deactivate_neftune(model.train(), hook)
        torch.testing.assert_close(model(**batch).loss, hook_free.train()(**batch).loss)


def test_whoever_watches_or_replaces_the_embeddings_reaches_what_forward_reads():
    batch = collated()
    ids = batch["input_ids"]
    for way in WAYS:
        right = mixed_hybrid(**way)
        right = right(inputs_embeds=2 * right.get_input_embeddings()(ids)).logits

        def doubled(module, inputs, output):
            return 2 * output

        hooked = mixed_hybrid(**way)
        hooked.get_input_embeddings().register_forward_hook(doubled)
        assert torch.equal(hooked(ids).logits, right)
        copied = copy.deepcopy(hooked)
        with torch.no_grad():
            copied.component("part_0").get_input_embeddings().weight.zero_()  # the copy's hook reads the copy's parts
        assert torch.equal(hooked(ids).logits, right) and not torch.equal(copied(ids).logits, right)
        replaced = mixed_hybrid(**way)
        before = replaced.get_input_embeddings().forward
        replaced.get_input_embeddings().forward = lambda ids, before=before: 2 * before(ids)
        assert torch.equal(replaced(ids).logits, right)
        said = [
            one.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, use_cache=use, pad_token_id=0)
            for one in (hooked, replaced)
            for use in (True, False)
        ]
        assert all(torch.equal(said[0], one) for one in said[1:])
        gradients = mixed_hybrid(**way)
        gradients.requires_grad_(False)
        gradients.enable_input_require_grads()
        assert gradients(ids).logits.requires_grad
        of_component = mixed_hybrid(**way)
        for name in of_component.config.component_names:
            of_component.component(name).get_input_embeddings().register_forward_hook(doubled)
        assert torch.equal(of_component(ids).logits, right)


def test_watched_embeddings_of_a_classifier_leave_the_last_real_token_where_it_is(tmp_path):
    mixed_hybrid().save_pretrained(tmp_path)
    model = ManticoreForSequenceClassification.from_pretrained(tmp_path, num_labels=2)
    model.config.pad_token_id = 3
    ids = torch.tensor([[5, 6, 7, 3, 3], [5, 6, 7, 8, 9]])
    before = model(ids).logits
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: output + 0)
    assert torch.equal(model(ids).logits, before)


def test_predictions_are_logits_as_of_any_model(tmp_path):
    """Whatever else a hybrid's forward gives: what the user's metrics get is one array."""
    model = mixed_hybrid(component_loss_weight=1.0)
    seen = []

    def metrics(prediction):
        seen.append(prediction.predictions)
        return {}

    trainer = Trainer(
        model,
        quiet(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=rows(),
        data_collator=default_data_collator,
        compute_metrics=metrics,
    )
    trainer.evaluate()
    ids = torch.tensor(rows()["input_ids"])
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(seen[0]), model(ids).logits)
    assert trainer.predict(rows().remove_columns("labels")).predictions.shape == seen[0].shape


def test_losses_of_components_are_counted_in_micro_batches_as_in_one_batch(tmp_path):
    """The whole loss, over rows with different numbers of labels."""
    found = []
    for size, pieces in ((4, 1), (2, 2), (1, 4)):
        model = mixed_hybrid(component_loss_weight=0.5, mix_loss_weight=0.7)
        args = {"gradient_accumulation_steps": pieces, "per_device_train_batch_size": size}
        found.append(trained(model, tmp_path, **args))
    for one in found[1:]:
        agree({**one[0], "rows": 4}, found[0][0], "micro-batches", 1e-4)
        for key, value in found[0][1].items():
            torch.testing.assert_close(one[1][key], value, atol=1e-4, rtol=1e-4, msg=key)
    model, batch = mixed_hybrid(component_loss_weight=0.5, mix_loss_weight=0.7), collated()
    states = [model.component(name)(batch["input_ids"]).logits for name in model.config.component_names]
    by_hand = [
        cross_entropy(one[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        for one in (model(batch["input_ids"]).logits, *states)
    ]
    torch.testing.assert_close(model(**batch).loss, 0.7 * by_hand[0] + 0.5 * (by_hand[1] + by_hand[2]))


def test_every_parameter_gets_a_gradient(tmp_path):
    """As DDP expects where activations are checkpointed; TRL's trainers do that by default, the gate replaces alpha."""
    batch = collated()
    for way in ({}, {"mixture": "static"}, *WAYS[1:], {"preset": "paper"}, {"mixture_space": "prob"}):
        model = mixed_hybrid(**way).train()
        model.save_pretrained(tmp_path)
        scores = ManticoreForSequenceClassification.from_pretrained(tmp_path, num_labels=2).train()
        for one, labels in ((model, batch["labels"]), (scores, torch.tensor([0, 1, 0, 1]))):
            one(batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
            lacking = [key for key, parameter in one.named_parameters() if parameter.grad is None]
            assert not lacking, (way, type(one).__name__, lacking)
