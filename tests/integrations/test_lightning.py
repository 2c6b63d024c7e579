"""Lightning's own Trainer with the callback: zeros, steps, evaluation, checkpoints, resuming, leaving."""

import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import anymask
from anymask.errors import MaskError, SettingError, TechniqueError
from anymask.surgery import fingerprint
from anymask.techniques import Distillation, LRsI, Preconditioning

try:
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import Callback, ModelCheckpoint

    from anymask.integrations.lightning import AnyMask
except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision, which it imports, built for another torch
    pytest.skip(f"lightning cannot be imported: {error}", allow_module_level=True)

pytestmark = [
    # Advice of Lightning's about speed and loggers, which does not concern a test of four steps.
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*The number of training batches.*"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory.*"),
    pytest.mark.filterwarnings("ignore:.*GPU available but not used.*"),
    # Lightning's own calls of what torch or Python have deprecated.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
LEARNED = anymask.Recipe.from_settings(
    [
        {"name": "ghost_activation"},
        {"name": "ghost_skip", "kind": "learned", "schedule": {"end": "90%"}},
        {"name": "label_smoothing"},
    ]
)


class Small(LightningModule):
    def __init__(self, sparse: AnyMask | None = None, *, calls: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
        )  # fmt: skip
        self.sparse, self.calls, self.seen, self.strengths = [sparse], calls, [], []

    def training_step(self, batch, _index):
        x, y = batch
        self.seen.append(float(x.sum()))
        loss = self.sparse[0].loss if self.sparse[0] and self.calls else nn.functional.cross_entropy
        return loss(self.net(x), y)

    def validation_step(self, batch, _index):
        self.strengths += [float(g.strength) for m in self.net.modules() for g in getattr(m, "ghosts", [])]
        self.log("val", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(*, shuffle: bool = False) -> DataLoader:
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 1, 6, 6, generator=g), torch.randint(3, (24,), generator=g)
    return DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)


def mask_of(module: Small) -> anymask.Mask:
    return anymask.prune(module.net, "magnitude", sparsity=0.6, seed=0)


def trainer(tmp_path: Path, *callbacks: Callback, epochs: int = 2, **settings) -> Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 1}
    saves = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    return Trainer(
        max_epochs=epochs, accelerator="cpu", default_root_dir=tmp_path, callbacks=list(callbacks), enable_checkpointing=saves,
        **quiet, **settings,
    )  # fmt: skip


def zeros_kept(mask: anymask.Mask, network: nn.Module) -> bool:
    return all(bool((p[~mask[n]] == 0).all()) for n, p in mask.check(network).items())


def test_a_compiled_network_is_watched_where_a_technique_looks(tmp_path):
    module, graphs = Small(), []
    mask = mask_of(module)
    module.sparse[0] = sparse = AnyMask(mask, anymask.Recipe((Preconditioning(every=3),)))
    network, module.net = module.net, torch.compile(module.net, backend=lambda graph, _: (graphs.append(1), graph.forward)[1])
    trainer(tmp_path, sparse, epochs=1).fit(module, data(), data())
    assert graphs
    assert zeros_kept(mask, network)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_zeros_are_kept_steps_are_the_optimisers_and_nothing_is_left(tmp_path, accumulate):
    module = Small()
    mask, before = mask_of(module), fingerprint(module.net)
    module.sparse[0] = sparse = AnyMask(mask, anymask.Recipe((LRsI(), *LEARNED.techniques)))
    fit = trainer(tmp_path, sparse, accumulate_grad_batches=accumulate)
    fit.fit(module, data(), data())
    assert zeros_kept(mask, module.net)
    assert fingerprint(module.net) == before
    assert sparse.state_dict()["recipe"]["position"] == fit.global_step == {1: 12, 4: 4}[accumulate]
    assert set(sparse.state_dict()["recipe"]["found"]) == {"lrsi", "ghost_activation", "ghost_skip", "label_smoothing"}
    assert module.strengths
    assert set(module.strengths) == {0.0}  # every validation saw the plain network
    assert float(fit.callback_metrics["anymask/sparsity"]) == pytest.approx(mask.sparsity)
    assert float(fit.callback_metrics["anymask/strength/ghost_skip"]) == 0
    assert anymask.hold(mask, module.net, torch.optim.SGD(module.parameters())).mask is mask


def test_the_order_of_the_data_is_that_of_a_training_without(tmp_path):
    seen = []
    for recipe in (None, "tost"):
        module = Small()
        callbacks = []
        if recipe:
            module.sparse[0] = AnyMask(mask_of(module), recipe)
            callbacks = [module.sparse[0]]
        torch.manual_seed(5)
        trainer(tmp_path, *callbacks).fit(module, data(shuffle=True), data())
        seen.append(module.seen)
    assert len(seen[0]) == 12
    assert seen[0] == seen[1]


def test_a_resumed_training_equals_an_undisturbed_one(tmp_path):
    ends = []
    for cut in (False, True):
        module = Small()
        mask = mask_of(module)
        module.sparse[0] = sparse = AnyMask(mask, LEARNED)
        saver = ModelCheckpoint(dirpath=tmp_path, filename="at{epoch}-" + str(cut), save_top_k=-1)
        if not cut:
            trainer(tmp_path, sparse, saver, epochs=3).fit(module, data(), data())
        else:
            saved = torch.load(tmp_path / "atepoch=0-False.ckpt", weights_only=True)
            assert set(saved["state_dict"]) == set(module.state_dict())  # the checkpoint is the plain network's
            (own,) = [s for key, s in saved["callbacks"].items() if key.startswith("AnyMask")]
            assert own["ghosts"]
            assert own["slots"]
            trainer(tmp_path, sparse, saver, epochs=3).fit(module, data(), data(), ckpt_path=tmp_path / "atepoch=0-False.ckpt")
        assert zeros_kept(mask, module.net)
        ends.append(module.state_dict())
    assert ends[0].keys() == ends[1].keys()
    assert [key for key in ends[0] if not torch.equal(ends[0][key], ends[1][key])] == []


def test_a_teacher_is_learned_from(tmp_path):
    ends = []
    for bias in (0.0, 5.0):
        module, teacher = Small(), Small().net
        teacher[-1].bias.data += torch.tensor([bias, 0.0, 0.0])
        module.sparse[0] = AnyMask(mask_of(module), anymask.Recipe((Distillation(share=1.0),)), teacher=teacher)
        trainer(tmp_path, module.sparse[0]).fit(module, data(), data())
        ends.append(module.net(data().dataset.tensors[0]).softmax(1)[:, 0].mean().item())
    assert ends[1] > ends[0] + 0.3  # it is surer of the class that its teacher is sure of


def test_a_loss_that_is_never_asked_for_is_refused(tmp_path):
    module = Small(calls=False)
    sparse = AnyMask(mask_of(module), "tost:label_smoothing")
    with pytest.raises(TechniqueError, match=r"return `callback.loss\(output, target\)`.*train without a recipe"):
        trainer(tmp_path, sparse).fit(module, data(), data())


def test_an_interrupted_training_leaves_the_plain_network(tmp_path):
    class Break(Callback):
        def on_train_batch_end(self, *_):
            raise RuntimeError("power cut")

    module = Small()
    mask, before = mask_of(module), fingerprint(module.net)
    module.sparse[0] = sparse = AnyMask(mask, LEARNED)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer(tmp_path, sparse, Break()).fit(module, data(), data())
    assert fingerprint(module.net) == before
    assert zeros_kept(mask, module.net)
    assert sparse.state_dict()["recipe"]["position"] == 1


def test_ghosts_that_are_cut_off_are_warned_of(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = True

    module = Small()
    module.sparse[0] = sparse = AnyMask(mask_of(module), LEARNED)
    with pytest.warns(UserWarning, match="cut off"):
        trainer(tmp_path, sparse, Stop()).fit(module, data(), data())


def test_zeros_of_a_pruned_checkpoint_are_kept_and_a_dense_one_is_refused(tmp_path):
    module = Small()
    mask = mask_of(module)
    with pytest.raises(MaskError, match="without a single zero"):
        trainer(tmp_path, AnyMask("zeros")).fit(module, data(), data())
    mask.apply(module.net)
    trainer(tmp_path, AnyMask("zeros")).fit(module, data(), data())
    assert zeros_kept(mask, module.net)


def test_several_optimisers_and_odd_batches_are_refused(tmp_path):
    class Two(Small):
        automatic_optimization = False

        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self):
            parameters = list(self.net.parameters())
            return torch.optim.SGD(parameters[:2], lr=0.1), torch.optim.SGD(parameters[2:], lr=0.1)

    module = Two()
    with pytest.raises(MaskError, match="2 of 2 optimisers"):
        trainer(tmp_path, AnyMask(mask_of(module))).fit(module, data(), data())
    odd = DataLoader([{"x": torch.randn(1, 6, 6), "y": 0}] * 4)
    with warnings.catch_warnings(), pytest.raises(SettingError, match="split="):
        trainer(tmp_path, AnyMask(None, "tost")).fit(Small(), odd, data())
