"""What TrainingArguments change of the computation: on a hybrid of one component as on the component alone.

Hybrids of several components have no plain twin; there the same is computed by hand.
"""

import copy

import pytest
import torch
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState
from tiny_hybrid import QUIET, mixed_hybrid, neox, rows_of
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, default_data_collator
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
    values = {"max_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4, "logging_steps": 1,
              "learning_rate": 0.1, "optim": "sgd", **QUIET}  # fmt: skip
    args = TrainingArguments(str(folder), **{**values, **settings})
    torch.manual_seed(0)
    trainer = Trainer(model, args, train_dataset=rows(), eval_dataset=rows(), data_collator=default_data_collator,
                      compute_metrics=metrics)  # fmt: skip
    trainer.train()
    found = {**trainer.evaluate(), "train": [one for one in trainer.state.log_history if "loss" in one]}
    times = ("runtime", "per_second")
    found["train"] = [{k: v for k, v in one.items() if not k.endswith(times)} for one in found["train"]]
    found = {key: value for key, value in found.items() if not key.endswith(times)}
    return found, dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())


class Metrics:
    """Reads all that the Trainer hands over."""

    def __init__(self):
        self.batches = []

    def __call__(self, prediction, compute_result=True):
        known = prediction.label_ids[:, 1:] != -100
        right = prediction.predictions[:, :-1].argmax(-1) == prediction.label_ids[:, 1:]
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
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "clipping and decay": {"max_grad_norm": 0.01, "weight_decay": 0.3, "optim": "adafactor", "learning_rate": 1e-3},
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
        "Liger": {"use_liger_kernel": True},
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
        losses[name] = out["plain"][0]["train"][-1]["loss"]
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


def test_parts_of_rows_are_refused(monkeypatch):
    """What accelerate knows where a `parallelism_config` asks for context or sequence parallelism."""
    model = mixed_hybrid()
    for sizes, told in (({"cp_size": 2}, "cp_size=2"), ({"sp_size": 2, "sp_backend": "deepspeed"}, "sp_size=2"),
                        ({"tp_size": 2}, None), ({"dp_replicate_size": 2}, None)):  # fmt: skip
        monkeypatch.setitem(AcceleratorState._shared_state, "parallelism_config", ParallelismConfig(**sizes))
        if told is None:
            assert model.train().training and not model.eval().training
            continue
        for mode in (model.train, model.eval):
            with pytest.raises(ManticoreError, match=f"{told}: each process would get a part of every row"):
                mode()


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
        said = [one.generate(ids[:1, :4], max_new_tokens=4, do_sample=False, use_cache=use, pad_token_id=0)
                for one in (hooked, replaced) for use in (True, False)]  # fmt: skip
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

    trainer = Trainer(model, quiet(tmp_path, per_device_eval_batch_size=4), eval_dataset=rows(),
                      data_collator=default_data_collator, compute_metrics=metrics)  # fmt: skip
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
        agree(one[0], found[0][0], "micro-batches", 1e-4)
        for key, value in found[0][1].items():
            torch.testing.assert_close(one[1][key], value, atol=1e-4, rtol=1e-4, msg=key)
    model, batch = mixed_hybrid(component_loss_weight=0.5, mix_loss_weight=0.7), collated()
    states = [model.component(name)(batch["input_ids"]).logits for name in model.config.component_names]
    by_hand = [cross_entropy(one[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()) for one in
               (model(batch["input_ids"]).logits, *states)]  # fmt: skip
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
