"""The Trainer of transformers with the callback, on a small ViT and a small BERT made from their configurations."""

from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch import nn

import anymask
from anymask.errors import MaskError, SettingError, TechniqueError
from anymask.surgery import form as fingerprint  # Accelerate leaves attributes
from anymask.techniques import Attached, Context, Distillation, Preconditioning, Technique

try:
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        BertForTokenClassification,
        GPT2Config,
        GPT2LMHeadModel,
        Trainer,
        TrainerCallback,
        TrainingArguments,
        ViTConfig,
        ViTForImageClassification,
    )

    from anymask.integrations.transformers import FILE, AnyMask
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision, which it imports, built for another torch
    pytest.skip(f"transformers cannot be imported: {error}", allow_module_level=True)

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),  # the trainer's default, without a GPU
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # their own calls of what torch or Python have deprecated
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 3}
SMOOTHING = "tost:label_smoothing"


def vit() -> nn.Module:
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_channels=1, **SIZES))


def bert() -> nn.Module:
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, **SIZES))


def images(count: int = 32) -> list[dict]:
    g = torch.Generator().manual_seed(1)
    return [{"pixel_values": torch.randn(1, 8, 8, generator=g), "labels": i % 3} for i in range(count)]


def sentences(count: int = 32) -> list[dict]:
    g = torch.Generator().manual_seed(1)
    return [
        {"input_ids": torch.randint(20, (6,), generator=g), "attention_mask": torch.ones(6).long(), "labels": i % 3} for i in range(count)
    ]


def pruned(model: nn.Module) -> tuple[nn.Module, anymask.Mask]:
    mask = anymask.prune(model, "magnitude", sparsity=0.6, seed=0)
    mask.apply(model)
    return model, mask


def trainer(folder: Path, model: nn.Module, rows: list[dict], *callbacks: TrainerCallback, loss=None, **settings) -> Trainer:
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-3}
    quiet["per_device_train_batch_size"] = 4
    args = TrainingArguments(output_dir=str(folder), num_train_epochs=2, per_device_eval_batch_size=8, **{**quiet, **settings})
    return Trainer(model=model, args=args, train_dataset=rows, eval_dataset=rows[:8], callbacks=list(callbacks), compute_loss_func=loss)


def test_a_compiled_model_is_watched_where_a_technique_looks(tmp_path):
    (model, mask), graphs = pruned(vit()), []
    sparse = AnyMask(mask, anymask.Recipe((Preconditioning(every=3),)))
    model.compile(backend=lambda graph, _: (graphs.append(1), graph.forward)[1])
    trainer(tmp_path, model, images(), sparse).train()
    assert graphs
    assert all(not p[~mask[n]].any() for n, p in mask.check(model).items())


def zeros_kept(mask: anymask.Mask, model: nn.Module) -> bool:
    return all(bool((p[~mask[n]] == 0).all()) for n, p in mask.check(model).items())


@pytest.mark.parametrize(("make", "rows"), [(vit, images()), (bert, sentences())], ids=["vit", "bert"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_pruned_model_is_fine_tuned_without_losing_a_zero(tmp_path, make, rows, accumulate):
    model, mask = pruned(make())
    before = fingerprint(model)
    sparse = AnyMask("zeros", SMOOTHING)
    fit = trainer(tmp_path, model, rows, sparse, loss=sparse.loss, gradient_accumulation_steps=accumulate, eval_strategy="epoch")
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    fit.train()
    assert zeros_kept(mask, model)
    assert any(not torch.equal(weights[name], p) for name, p in model.named_parameters())
    assert fingerprint(model) == before
    logged = [row for row in fit.state.log_history if "loss" in row]
    assert len(logged) == fit.state.global_step == {1: 16, 4: 4}[accumulate]
    assert logged[0]["anymask/sparsity"] == pytest.approx(mask.sparsity)
    assert "anymask/strength/label_smoothing" in logged[0]


@pytest.mark.parametrize("of", ["sentences", "tokens"])
def test_a_teacher_is_learned_from(tmp_path, of):
    kind = BertForTokenClassification if of == "tokens" else BertForSequenceClassification
    model, _ = pruned(kind(bert().config))
    rows = [{**row, "labels": row["input_ids"] % 3} if of == "tokens" else row for row in sentences()]
    sparse = AnyMask("zeros", anymask.Recipe((Distillation(),)), teacher=kind(bert().config))
    fit = trainer(tmp_path, model, rows, sparse, loss=sparse.loss)
    fit.train()
    assert "anymask/strength/distillation" in next(row for row in fit.state.log_history if "loss" in row)


def test_without_a_recipe_the_trainers_own_loss_stays(tmp_path):
    losses = []
    for callbacks in ([], [AnyMask("zeros")]):
        model, _ = pruned(vit())
        fit = trainer(tmp_path, model, images(), *callbacks, max_steps=1)
        fit.train()
        losses.append(fit.state.log_history[0]["loss"])
    assert losses[0] == losses[1]


def test_the_loss_of_accumulated_batches_is_that_of_one_large_batch(tmp_path):
    logged = []
    for size, accumulate in ((8, 1), (2, 4)):
        model, _ = pruned(vit())
        sparse = AnyMask("zeros", SMOOTHING)
        fit = trainer(
            tmp_path, model, images(), sparse, loss=sparse.loss, max_steps=2, gradient_accumulation_steps=accumulate,
            per_device_train_batch_size=size,
        )  # fmt: skip
        fit.train()
        logged.append([row["loss"] for row in fit.state.log_history if "loss" in row])
    assert logged[0] == pytest.approx(logged[1], abs=1e-4)


def test_the_loss_of_a_causal_language_model_is_its_own():
    """A token's label is the token after it."""
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
    ).eval()
    tokens = torch.randint(11, (3, 8))
    tokens[0, 5:] = 10
    labels = tokens.masked_fill(tokens == 10, -100)
    sparse = AnyMask()
    sparse.on_init_end(None, None, None, model=model)
    with torch.no_grad():
        output = model(input_ids=tokens, labels=labels)
        torch.testing.assert_close(sparse.loss(output, labels), output.loss)
        count = 4 * (labels[:, 1:] != -100).sum()
        torch.testing.assert_close(sparse.loss(output, labels, count), output.loss / 4)


@dataclass(frozen=True)
class Asks(Technique):
    """Asks for the loss of the first batch before the training begins, as LRsI does."""

    name: ClassVar[str] = "asks"
    seam: ClassVar[str] = "init"

    def attach(self, context: Context) -> Attached:
        inputs, labels = context.data[0]
        mine = context.loss(context.model(**inputs).logits, labels)
        torch.testing.assert_close(mine, context.model(**inputs, labels=labels).loss)
        attached = Attached()
        attached.found = "asked"
        return attached


@pytest.mark.parametrize("kind", ["causal", "tokens", "sentences"])
def test_techniques_that_ask_for_the_loss_before_the_training_get_that_of_the_model(tmp_path, kind):
    rows = [{"input_ids": s["input_ids"], "labels": s["labels"] if kind == "sentences" else s["input_ids"] % 3} for s in sentences()]
    if kind == "causal":
        model = GPT2LMHeadModel(
            GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None)
        )
    else:
        model = bert() if kind == "sentences" else BertForTokenClassification(bert().config)
    for module in model.modules():
        module.p = 0.0  # of dropouts: the loss is asked for twice
    model, mask = pruned(model)
    recipe = anymask.Recipe((Asks(), *anymask.Recipe.preset("tost:lrsi,label_smoothing").techniques))
    sparse = AnyMask("zeros", recipe)
    trainer(tmp_path, model, rows, sparse, loss=sparse.loss, max_steps=2).train()
    assert zeros_kept(mask, model)


def test_numbers_are_compared_with_the_one_output_of_each():
    sparse = AnyMask(loss=nn.functional.mse_loss)
    outputs, labels = {"logits": torch.randn(5, 1)}, torch.randn(5)
    torch.testing.assert_close(sparse.loss(outputs, labels), (outputs["logits"][:, 0] - labels).square().mean())


def test_evaluation_in_the_middle_sees_the_plain_network(tmp_path):
    class See(TrainerCallback):
        def __init__(self):
            self.strengths, self.acted = [], []

        def on_substep_end(self, *_args, model, **_):
            self.acted += of(model)

        def on_prediction_step(self, *_args, model, **_):
            self.strengths += of(model)

    def of(model: nn.Module) -> list[float]:
        return [float(g.strength) for m in model.modules() for g in getattr(m, "ghosts", [])]

    model, see = Convolutions(), See()
    sparse = AnyMask(anymask.prune(model, "magnitude", sparsity=0.5, seed=0), LEARNED)
    settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True, "gradient_accumulation_steps": 2}
    trainer(tmp_path, model, images(), sparse, see, loss=sparse.loss, **settings).train()
    assert set(see.strengths) == {0.0}
    assert max(see.acted) > 0.5


LEARNED = anymask.Recipe.from_settings(
    [{"name": "lrsi"}, {"name": "ghost_skip", "kind": "learned", "schedule": {"end": "90%"}}, {"name": "label_smoothing"}]
)


class Convolutions(nn.Module):
    """A convolutional network that speaks the trainer's language with a plain tensor."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip

    def forward(self, pixel_values, labels=None):
        return {"logits": self.net(pixel_values)}


@pytest.mark.parametrize("kind", ["bert", "ghosts"])
def test_a_resumed_training_equals_an_undisturbed_one(tmp_path, kind):
    ends = []
    for cut in (False, True):
        model = bert() if kind == "bert" else Convolutions()
        mask = anymask.prune(model, "magnitude", sparsity=0.6, seed=0)
        sparse = AnyMask(mask, SMOOTHING if kind == "bert" else LEARNED)
        rows = sentences() if kind == "bert" else images()
        fit = trainer(tmp_path, model, rows, sparse, loss=sparse.loss, save_strategy="steps", save_steps=5)
        saved = tmp_path / "checkpoint-5"
        if cut:
            own = torch.load(saved / FILE, weights_only=True)
            assert own["recipe"]["position"] == 5
            assert bool(own["ghosts"]) is bool(own["slots"]) is (kind == "ghosts")
        fit.train(resume_from_checkpoint=str(saved) if cut else None)
        assert zeros_kept(mask, model)
        ends.append(model.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_a_checkpoint_without_our_file_is_refused(tmp_path):
    model, _ = pruned(vit())
    trainer(tmp_path, model, images(), save_strategy="steps", save_steps=5).train()
    with pytest.raises(SettingError, match=r"checkpoint=path"):
        trainer(tmp_path, model, images(), AnyMask("zeros")).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


def test_the_batches_are_those_of_a_training_without(tmp_path):
    seen = []
    for recipe in (None, LEARNED):
        model, now = Convolutions(), []
        model.net.register_forward_pre_hook(lambda m, args, now=now: now.append(float(args[0].sum())) if m.training else None)
        sparse = AnyMask(None, recipe)
        started = Started(now)
        trainer(tmp_path, model, images(), sparse, started, loss=sparse.loss).train()
        seen.append(now)
    assert len(seen[0]) == 16
    assert seen[0] == seen[1]


class Started(TrainerCallback):
    """Forget what was seen before the first step: the looks of LRsI."""

    def __init__(self, seen: list[float]) -> None:
        self.seen = seen

    def on_train_begin(self, *_args, **_):
        self.seen.clear()


def test_batches_of_a_split_of_ones_own_are_moved_whole():
    class SeenError(Exception):
        pass

    def split(batch):
        raise SeenError([part.device.type for part in (*batch[0], batch[1])])

    sparse = AnyMask(None, LEARNED, split=split)
    args, state = SimpleNamespace(device=torch.device("meta"), gradient_accumulation_steps=1), SimpleNamespace(max_steps=1, global_step=0)
    loader, model = [([torch.ones(1)], torch.ones(1))], Convolutions()
    with pytest.raises(SeenError, match=r"\['meta', 'meta'\]"):
        sparse.on_train_begin(args, state, None, model=model, optimizer=torch.optim.SGD(model.parameters()), train_dataloader=loader)


def test_a_loss_that_is_never_asked_for_is_refused(tmp_path):
    model, _ = pruned(vit())
    with pytest.raises(TechniqueError, match=r"compute_loss_func=callback.loss"):
        trainer(tmp_path, model, images(), AnyMask("zeros", SMOOTHING)).train()


def test_a_dense_model_has_no_zeros_to_keep(tmp_path):
    with pytest.raises(MaskError, match="without a single zero"):
        trainer(tmp_path, vit(), images(), AnyMask("zeros")).train()


def test_after_an_interruption_the_next_training_begins_clean(tmp_path):
    class Break(TrainerCallback):
        def on_step_end(self, *_args, **_):
            raise KeyboardInterrupt

    model = Convolutions()
    mask, before = anymask.prune(model, "magnitude", sparsity=0.5, seed=0), fingerprint(model)
    sparse = AnyMask(mask, LEARNED)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path, model, images(), sparse, Break(), loss=sparse.loss).train()
    trainer(tmp_path, model, images(), sparse, loss=sparse.loss).train()
    assert fingerprint(model) == before
    assert zeros_kept(mask, model)
