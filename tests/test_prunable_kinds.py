"""Weights of every kind of layer: found, pruned, held, and scaled by LRsI."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

import anymask
from anymask import Recipe
from anymask.errors import AnymaskError, MaskError
from anymask.prunables import KINDS, prunable, transposed_groups
from anymask.techniques import LRsI, RescaleSettings

N, T, WORDS, CLASSES = 6, 5, 7, 3


class Attention(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **settings)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        other = x[..., : self.attention.kdim]
        return self.head(self.attention(x, other, other, need_weights=False)[0].mean(1))


class Words(nn.Module):
    def __init__(self, tied=False):
        super().__init__()
        self.embedding, self.lstm, self.head = nn.Embedding(WORDS, 4), nn.LSTM(4, 4, batch_first=True), nn.Linear(4, WORDS)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.lstm(self.embedding(x))[0][:, -1])


def volume():
    return nn.Sequential(nn.Conv3d(1, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, CLASSES))


def wave():
    return nn.Sequential(nn.Conv1d(1, 3, 2), nn.ReLU(), nn.ConvTranspose1d(3, 4, 2), nn.Flatten(), nn.Linear(20, CLASSES))


def floats(*shape):
    return lambda: torch.randn(N, *shape)


def words():
    return torch.randint(WORDS, (N, T))


NETS = {
    "attention": (Attention, floats(T, 4), ["attention.in_proj_weight", "attention.out_proj.weight", "head.weight"]),
    "attention of two widths": (
        lambda: Attention(kdim=3, vdim=3),
        floats(T, 4),
        [*(f"attention.{part}_proj_weight" for part in "qkv"), "attention.out_proj.weight", "head.weight"],
    ),
    "words": (Words, words, ["embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"]),
    "tied words": (lambda: Words(tied=True), words, ["embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0"]),
    "volume": (volume, floats(1, 3, 3, 3), ["0.weight", "3.weight"]),
    "wave": (wave, floats(1, 5), ["0.weight", "2.weight", "4.weight"]),
}


def made(name):
    torch.manual_seed(0)
    net, inputs, names = NETS[name]
    return net(), [(inputs(), torch.arange(N) % CLASSES) for _ in range(2)], names


@pytest.mark.parametrize("method", ["magnitude", "snip"])
@pytest.mark.parametrize("name", NETS)
def test_prune_lrsi_and_hold_on_every_kind(name, method):
    model, batches, names = made(name)
    assert list(prunable(model, kinds=KINDS)) == names
    mask = anymask.prune(model, method, sparsity=0.5, data=batches, kinds=list(KINDS))
    assert mask.kept == mask.total - round(0.5 * mask.total)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    anymask.hold(mask, model, optimizer)
    scaled = Recipe((LRsI(settings=RescaleSettings(iterations=3)),)).attach(model, optimizer, total_steps=100, data=batches)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for x, y in batches:
        scaled.loss(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    for key, p in mask.check(model).items():
        assert int((p == 0).sum()) >= int((~mask[key]).sum())
        assert not bool(p[~mask[key]].any())
        assert not torch.equal(p, before[key])
    scaled.finish(early=True)


@pytest.mark.parametrize("name", ["volume", "wave"])
def test_synflow_on_convolutions_of_one_and_three_dimensions(name):
    model, batches, _ = made(name)
    mask = anymask.prune(model, "synflow", sparsity=0.5, data=batches)
    assert mask.kept == mask.total - round(0.5 * mask.total)
    assert not mask.collapsed()


def test_synflow_through_an_attention():
    model, batches, names = made("attention")
    assert list(anymask.prune(model, "synflow", sparsity=0.5, data=batches)) == names


def test_wanda_names_the_projections_that_it_cannot_see_and_works_without_them():
    model, batches, _ = made("attention")
    with pytest.raises(MaskError, match=r"exclude=\['attention.in_proj_weight', 'attention.out_proj.weight'\]"):
        anymask.prune(model, "wanda", sparsity=0.5, data=batches)
    assert list(anymask.prune(model, "wanda", sparsity=0.5, data=batches, exclude=["attention"])) == ["head.weight"]


def test_wanda_refuses_an_embedding_whose_inputs_are_no_numbers_to_weigh():
    model, batches, _ = made("words")
    with pytest.raises(AnymaskError, match=r"embedding\.weight"):
        anymask.prune(model, "wanda", sparsity=0.5, data=batches, kinds=["linear", "embedding"])


def test_embeddings_and_recurrent_weights_are_left_out_unless_asked_for():
    assert list(prunable(Words())) == ["head.weight"]
    assert list(prunable(Words(tied=True))) == ["embedding.weight"]  # tied to a linear layer, it counts as one
    with pytest.raises(MaskError):
        prunable(Words(tied=True), kinds=["embedding"])
    assert list(prunable(nn.Sequential(nn.GRUCell(2, 2), nn.EmbeddingBag(2, 2)), kinds=["recurrent"])) == ["0.weight_ih", "0.weight_hh"]


@pytest.mark.filterwarnings("ignore:.*weight_norm")  # torch advises the newer one
def test_of_a_weight_that_hooks_compute_it_is_the_tensor_that_zeros_live_in():
    def named(layer, wrap, name="weight"):
        return list(prunable(wrap(layer, name), kinds=KINDS))

    for layer in (nn.Linear(4, 3), nn.Conv2d(4, 3, 1), nn.Embedding(4, 3)):
        assert named(copy.deepcopy(layer), nn.utils.weight_norm) == ["weight_v"]
        assert named(copy.deepcopy(layer), nn.utils.spectral_norm) == ["weight_orig"]
        assert named(layer, torch_prune.identity) == ["weight_orig"]
    assert named(nn.MultiheadAttention(4, 2), torch_prune.identity, "in_proj_weight") == ["in_proj_weight_orig", "out_proj.weight"]
    others = ["weight_ih_l0", "weight_ih_l0_reverse", "weight_hh_l0_reverse"]
    lstm = nn.LSTM(4, 3, bidirectional=True, proj_size=2)
    assert sorted(named(lstm, nn.utils.weight_norm, "weight_hh_l0")) == sorted([*others, "weight_hh_l0_v"])
    turned = torch_prune.identity(nn.ConvTranspose2d(4, 2, 3, groups=2), "weight")
    assert transposed_groups(turned) == {"weight_orig": 2}


def test_weights_that_parametrizations_compute_are_left_out_aloud():
    norms = nn.utils.parametrizations
    model = nn.Sequential(norms.weight_norm(nn.Linear(4, 3)), norms.spectral_norm(nn.Conv1d(3, 3, 1)), nn.Linear(3, 2))
    with pytest.warns(UserWarning, match=r"compute: 0\.weight, 1\.weight\. .*remove_parametrizations, .*exclude=\['0\.weight'"):
        mask = anymask.prune(model, "magnitude", sparsity=0.5)
    assert list(mask) == ["2.weight"]
    assert list(prunable(model, exclude=["0", "1.weight"])) == ["2.weight"]  # no warning, which would be an error here
    with pytest.raises(MaskError, match=r"compute: 0\.weight, 1\.weight\..*remove_parametrizations"):
        prunable(model[:2])
    for layer in model[:2]:
        nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert sorted(prunable(model)) == ["0.weight", "1.weight", "2.weight"]


def test_lazy_layers_have_to_see_a_batch_first():
    model = nn.Sequential(nn.LazyConv2d(2, 1), nn.Flatten(), nn.LazyLinear(3))
    mask = anymask.Mask({"2.weight": torch.eye(3)})
    for use in (lambda: anymask.prune(model, "magnitude", sparsity=0.5), lambda: mask.apply(model)):
        with pytest.raises(MaskError, match=r"no size yet: 0\.weight, .*2\.weight.*run one batch through the model first"):
            use()
    model(torch.zeros(1, 1, 2, 2))
    assert list(anymask.prune(model, "magnitude", sparsity=0.5)) == ["0.weight", "2.weight"]


def test_complex_weights_are_refused_where_they_are_ranked():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 3))
    for method in ("magnitude", "snip", "synflow"):
        with pytest.raises(MaskError, match=r"Sequential are complex: 0\.weight\. .*exclude=\['0\.weight'\]"):
            anymask.prune(model, method, sparsity=0.5, data=[(torch.randn(3, 4), torch.arange(3))])
    assert list(anymask.prune(model, "magnitude", sparsity=0.5, exclude=["0"])) == ["1.weight"]


def test_a_parameter_of_ones_own_beside_the_weight_is_no_weight():
    layer = nn.Linear(4, 3)
    layer.weight_scale = nn.Parameter(torch.ones(3))
    assert list(prunable(layer)) == ["weight"]


def test_a_tiny_gpt2_from_its_config():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=1, n_head=2, n_inner=12)
    model = transformers.GPT2LMHeadModel(config)
    layers = {f"transformer.h.0.{part}.weight": 1 for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert list(prunable(model)) == ["transformer.wte.weight", *layers]
    assert transposed_groups(model) == layers

    mask = anymask.prune(model, "magnitude", sparsity=0.5, pattern="channel", exclude=["transformer.wte"])
    fan = mask["transformer.h.0.mlp.c_fc.weight"]  # (in, out): an output is a column
    assert bool((fan.all(0) | ~fan.any(0)).all())
    assert 0 < int(fan.any(0).sum()) < 12

    mask = anymask.prune(model, "magnitude", sparsity=0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    anymask.hold(mask, model, optimizer)
    ids = torch.randint(11, (4, 6))
    batches = [({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)]
    recipe = Recipe((LRsI(settings=RescaleSettings(iterations=3)),))
    running = recipe.attach(
        model, optimizer, total_steps=100, data=batches, loss=lambda out, y: nn.functional.cross_entropy(out.flatten(0, 1), y.flatten())
    )
    for inputs, y in batches:
        running.loss(model(**inputs), y).backward()
        optimizer.step()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert all(not bool(p[~mask[name]].any()) for name, p in mask.check(model).items())
    running.finish(early=True)
