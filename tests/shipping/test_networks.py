"""Whole networks as files: the same outputs, the promised size, the same accuracy; nothing of PyTorch to run them."""

import copy
import os
import pickle
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import anymask
from anymask import Mask, Recipe, data, models
from anymask.errors import AnymaskError, MaskError, SettingError
from anymask.kernels import available
from anymask.shipping import making, runtime
from anymask.shipping.making import ship
from anymask.shipping.rebuild import Rebuilt
from anymask.shipping.runtime import Program, load
from anymask.shipping.tracing import plain
from anymask.sparse import to_sparse
from anymask.techniques import GhostActivation, GhostSkip
from anymask.train import Protocol, accuracy
from tests.shipping.nets import both, close, network, said

NETWORKS = ("demonet", "resnet20-0.5x", "resnet18-0.125x", "resnet50-0.125x", "vgg11-0.25x", "mobilenet-0.25x", "mobilenetv2-0.25x")
WITHIN = {"bfloat16": 5e-2, "float16": 1e-2, "int8": 0.1}  # of the largest output; measured: 5e-3, 2e-3 and 0.04


@pytest.fixture(scope="module")
def batch():
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory, batch):
    """A network, and what was shipped of it; each once, because PyTorch's export takes seconds."""

    @cache
    def of(name):
        model, to = network(name), tmp_path_factory.mktemp("shipped") / "net.anymask"
        return model, ship(model, None, example=batch[:1], to=to, values="float32")

    return of


@pytest.mark.usefixtures("gather")
@both
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_the_same_as_in_pytorch(name, batch, shipped):
    model, done = shipped(name)
    program = load(done.path, threads=1)
    assert close(program(batch.numpy()), model(batch), within=1e-4)
    assert close(program(batch[:1].numpy()), model(batch[:1]), within=1e-4)
    assert close(Rebuilt(program.plan)(batch).detach().numpy(), model(batch), within=1e-4)
    assert done.kept == program.plan.kept
    assert not [step for step in said(program.plan) if step in ("Scale", "Add")]  # all taken up by convolutions


@pytest.mark.parametrize("name", models.MODELS)
def test_every_network_of_the_table_ships(name, batch, tmp_path):
    model = network(f"{name}-0.125x")
    done = ship(model, None, example=batch[:2], to=tmp_path / "net.anymask", values="float32")
    assert done.difference < 1e-5 * max(1, model(batch[:2]).abs().max().item())


@pytest.mark.parametrize("values", WITHIN)
@pytest.mark.parametrize("name", ["resnet20-0.5x", "vgg11-0.25x", "mobilenetv2-0.25x"])
def test_fewer_bits_a_value_differ_by_no_more_than_is_stated(name, values, batch, tmp_path):
    model = network(name)
    done = ship(model, None, example=batch, to=tmp_path / "net.anymask", values=values)
    assert done.difference <= WITHIN[values] * model(batch).abs().max().item()
    assert done.bytes == done.path.stat().st_size
    assert load(done.path).plan.values == values


def test_resnet18_has_the_promised_size(tmp_path):
    """Under 0.8 MB at 0.98 and 1.9 MB at 0.95 in float16, of 44.7 MB."""
    for sparsity, most in ((0.98, 0.8e6), (0.95, 1.9e6)):
        model = models.build("resnet18", classes=10, seed=0)
        mask = anymask.prune(model, "random-erk", sparsity=sparsity)
        mask.apply(model)
        done = ship(model, mask, example=torch.randn(1, 3, 32, 32), to=tmp_path / "net.anymask")
        assert done.kept == mask.kept
        assert done.total == mask.total
        assert 44.6e6 < done.dense_bytes < 44.8e6
        assert done.bytes < most
        assert done.bytes < 3.3 * done.kept  # two bytes a value, and a little more than one a position


def test_the_accuracy_stays(tmp_path):
    """In float16 to 0.1 point on 1,000 images of a network trained at 0.9."""
    dataset = data.load("fashion-mnist-5k")
    mean, std = data.statistics(dataset.train)
    batches = [data.Batches(split, batch_size=100, mean=mean, std=std, device="cpu") for split in (dataset.train, dataset.test)]
    model = models.build("demonet-0.5x", classes=10, channels=1, seed=0)
    mask = anymask.prune(model, "random-erk", sparsity=0.9)
    anymask.fit(model, batches[0], mask=mask, recipe=anymask.Recipe.preset("default"), protocol=Protocol(epochs=3, batch_size=100))
    wanted = accuracy(model, batches[1])
    assert wanted > 0.6  # it has learned something
    images, labels = (torch.cat(part).numpy() for part in zip(*batches[1], strict=True))
    for values, within in (("float16", 0.001), ("bfloat16", 0.005), ("int8", 0.01)):
        done = ship(model, mask, example=torch.from_numpy(images[:8]), to=tmp_path / "net.anymask", values=values)
        found = (load(done.path)(images).argmax(1) == labels).mean()
        assert abs(found - wanted) <= within + 1e-9


# -- running -------------------------------------------------------------------------------------------------------


def test_a_file_runs_without_torch(batch, tmp_path):
    """Neither `load` nor a call imports it, nor anything that trains."""
    model = network("resnet20-0.25x")
    ship(model, None, example=batch, to=tmp_path / "net.anymask", values="float32")
    np.save(tmp_path / "batch.npy", batch.numpy())
    code = """if True:
        import sys, numpy
        from anymask.shipping.runtime import load
        out = load("net.anymask", threads=1)(numpy.load("batch.npy"))
        numpy.save("out.npy", out)
        print([name for name in ("torch", "anymask.mask", "anymask.pruning", "onnx") if name in sys.modules])"""
    said = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert said.stdout.strip() == "[]"
    assert close(np.load(tmp_path / "out.npy"), model(batch), within=1e-4)


def test_float16_is_refused_where_the_file_is_another_network(batch, tmp_path, monkeypatch):
    """Rounding is no excuse: what is meant is compared before it is rounded."""
    model = network("demonet")
    monkeypatch.setattr("anymask.shipping.making.fused", lambda plan: plan)
    monkeypatch.setattr("anymask.shipping.making._answer", lambda net, x: net(x).detach().double().numpy() * 1.01 + 0.1)
    with pytest.raises(AnymaskError, match="other outputs than the model"):
        ship(model, None, example=batch, to=tmp_path / "net.anymask", values="float16")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_all_too_small_for_float16_are_told(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with torch.no_grad():
        model[0].weight.mul_(1e-9)
    with pytest.raises(SettingError, match=r"all 16 weights of a layer of 4 outputs are 0 in float16.*bfloat16"):
        ship(model, None, example=torch.randn(3, 4), to=tmp_path / "net.anymask")
    ship(model, None, example=torch.randn(3, 4), to=tmp_path / "net.anymask", values="bfloat16")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize(
    "before",
    [
        "wanted = program(x)",
        pytest.param(
            "anymask.kernels.Gather((64, 64, 3, 3), numpy.arange(9000), padding=(1, 1))"
            ".forward(numpy.ones((64, 8, 8, 64), numpy.float32), numpy.ones(9000, numpy.float32), threads=2)",
            marks=pytest.mark.skipif(not available(), reason="the native kernels were not built here"),
        ),
    ],
    ids=["the program", "somebody else"],
)
def test_a_child_of_a_fork_runs_after_its_parent_used_several_threads(before, batch, tmp_path):
    """OpenMP's threads are gone there, and to wait for them takes for ever; all that use it share them."""
    ship(network("demonet"), None, example=batch, to=tmp_path / "net.anymask")
    code = f"""if True:
        import os, signal, numpy, anymask, anymask.kernels
        program, x = anymask.load("net.anymask", threads=2), numpy.ones((64, 3, 32, 32), numpy.float32)
        wanted = program(x, threads=1)
        {before}
        child = os.fork()
        if child == 0:
            signal.alarm(20)
            os._exit(0 if numpy.allclose(program(x), wanted, atol=1e-5) else 1)
        print(os.waitpid(child, 0)[1])"""
    said = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True, timeout=60)
    assert said.stdout.strip() == "0"


def test_more_threads_than_channels_compute_a_large_batch(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)).eval()
    x = torch.randn(40_000, 3, 4, 4)
    program = load(ship(model, None, example=x[:2], to=tmp_path / "net.anymask", values="float32").path, threads=8)
    assert close(program(x.numpy()), model(x).detach(), within=1e-4)


def test_what_a_call_gives_stays_after_the_next_one(batch, tmp_path):
    program = Program(load(ship(network("demonet"), None, example=batch, to=tmp_path / "n.anymask").path).plan, threads=1)
    first = program(batch.numpy())
    kept = first.copy()
    program(-batch.numpy())
    program(batch[:1].numpy())
    assert np.array_equal(first, kept)
    assert np.array_equal(program(batch.numpy()), kept)


def test_a_large_batch_goes_through_in_parts(batch, tmp_path, monkeypatch):
    program = load(ship(network("demonet"), None, example=batch, to=tmp_path / "n.anymask").path, threads=1)
    whole = program(batch.numpy())
    monkeypatch.setattr("anymask.shipping.runtime._BYTES", 2 * 4 * sum(program._sizes))
    assert np.allclose(program(batch.numpy()), whole, atol=1e-5)


@pytest.mark.parametrize("name", ["demonet", "vgg11-0.25x", "mobilenetv2-0.25x"])
def test_threads_change_nothing(name, batch, tmp_path, monkeypatch):
    monkeypatch.setattr("anymask.shipping.runtime._PARTED", 1)
    program = load(ship(network(name), None, example=batch, to=tmp_path / "n.anymask").path)
    for _ in range(3):
        assert np.allclose(program(batch.numpy(), threads=1), program(batch.numpy(), threads=3), atol=1e-5)


def test_a_few_images_get_the_faster_number_of_threads(batch, tmp_path, monkeypatch):
    path = ship(network("demonet"), None, example=batch, to=tmp_path / "n.anymask").path
    monkeypatch.setattr(runtime, "_checked", lambda threads: threads or 2)  # a machine with two
    free, tried = Program(load(path).plan), []
    whole = runtime.Program._calls
    monkeypatch.setattr(
        runtime.Program, "_calls", lambda self, images, threads: (tried.append((images, threads)), whole(self, images, threads))[1]
    )
    monkeypatch.setattr(runtime, "_fastest", lambda ready: 1)
    for images in (2, 2, 8, 2):
        free(batch.numpy()[:1].repeat(images, axis=0))
    assert tried == [(2, 2), (2, 1), (2, 1), (8, 2), (2, 1)]  # the larger one took other memory
    monkeypatch.undo()
    first = batch.numpy()[:2]
    assert np.array_equal(free(first), free(first, threads=1))

    slow, quick = (runtime._Bound(np.ones(1), np.ones(1), [lambda wait=wait: time.sleep(wait)]) for wait in (0.01, 0))
    assert runtime._fastest([slow, quick]) == 1
    assert runtime._fastest([quick, slow]) == 0


def test_a_program_says_what_it_is(batch, tmp_path):
    program = load(ship(network("demonet"), None, example=batch, to=tmp_path / "n.anymask").path)
    assert repr(program).startswith("Program((3, 32, 32) -> (10,), 51,809 of 518,256 weights")


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3, 32, 31), (2, 1, 32, 32), (2,), ()])
def test_a_batch_of_another_shape_is_refused(shape, batch, tmp_path):
    program = load(ship(network("demonet"), None, example=batch, to=tmp_path / "n.anymask").path)
    with pytest.raises(SettingError, match=r"\(N, 3, 32, 32\)"):
        program(np.zeros(shape, np.float32))
    for threads in (0, 1.5, "2"):
        with pytest.raises(SettingError, match=f"threads came as {threads!r}"):
            program(batch.numpy(), threads=threads)


@pytest.mark.parametrize("given", ["images", [[1.0], [1.0, 2.0]], torch.ones(1, 3, requires_grad=True), np.ones((1, 3), complex), None])
def test_a_batch_of_no_numbers_is_refused(given, tmp_path):
    program = load(ship(nn.Linear(3, 2), None, example=torch.ones(1, 3), to=tmp_path / "n.anymask").path)
    with pytest.raises(SettingError, match=r"a batch that cannot be taken as numbers|a batch of shape \(\)"):
        program(given)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda program: pickle.loads(pickle.dumps(program))])
def test_a_program_can_be_copied_and_sent_to_another_process(again, batch, tmp_path):
    program = load(ship(network("demonet"), None, example=batch, to=tmp_path / "n.anymask").path, threads=1)
    right = program(batch.numpy())
    other = again(program)
    assert (other.threads, repr(other)) == (1, repr(program))
    assert np.array_equal(other(batch.numpy()), right)


# -- shipping ------------------------------------------------------------------------------------------------------


def test_the_model_stays_as_it_is(batch, tmp_path):
    model = network("resnet20-0.25x").train().double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model[0].eval()
    ship(model, None, example=batch, to=tmp_path / "net.anymask")
    assert [module.training for module in model.children()] == [False] + [True] * 6
    assert all(torch.equal(tensor, before[name]) and tensor.dtype == before[name].dtype for name, tensor in model.state_dict().items())


def test_a_mask_of_torch_prune_is_shipped_as_the_zeros_that_it_makes(tmp_path):
    model = nn.Sequential(nn.Linear(8, 4))
    prune.random_unstructured(model[0], "weight", amount=0.75)
    done = ship(model, None, example=torch.randn(2, 8), to=tmp_path / "net.anymask", values="float32")
    assert (done.kept, done.difference < 1e-6) == (8, True)


def test_a_model_with_sparse_layers_is_shipped_as_the_dense_one_is_and_stays_sparse(batch, tmp_path):
    kernels = pytest.importorskip("anymask.kernels")
    if not kernels.available():
        pytest.skip("the native kernels are not built here")
    model = network("resnet20-0.5x")
    mask = Mask({f"{name}.weight": m.weight != 0 for name, m in model.named_modules() if isinstance(m, nn.Conv2d)})
    ship(model, mask, example=batch, to=tmp_path / "dense.anymask", values="float32")
    to_sparse(model, mask, batch, measure=False)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    done = ship(model, mask, example=batch, to=tmp_path / "sparse.anymask", values="float32")
    assert done.path.read_bytes() == (tmp_path / "dense.anymask").read_bytes()
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shapes
    assert any(len(shape) == 1 and "conv" in name for name, shape in shapes.items())


def test_weights_that_the_mask_leaves_out_have_to_be_0(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    mask = Mask({"0.weight": torch.eye(3), "1.weight": torch.ones(3, 3)})
    with pytest.raises(MaskError, match=r"0\.weight \(6\)\. "):
        ship(model, mask, example=torch.ones(1, 3), to=tmp_path / "net.anymask")
    mask.apply(model)
    assert ship(model, mask, example=torch.ones(1, 3), to=tmp_path / "net.anymask").kept == 12
    assert [path.name for path in tmp_path.iterdir()] == ["net.anymask"]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"to": "net.pt"}, ".anymask, .onnx, .safetensors"),
        ({"values": "int4"}, "float32, bfloat16, float16, int8"),
        ({"to": "net.safetensors", "values": "int8"}, "float32 in .safetensors"),
        ({"example": torch.ones(0, 3)}, "example came without samples"),
        ({"example": [1.0]}, "example came as list"),
        ({"example": torch.full((1, 3), float("nan"))}, "example holds numbers that are not finite"),
        ({"info": {"epochs": np.float32(1)}}, "info cannot be kept.*float32"),
        ({"info": {"loss": float("nan")}}, "info cannot be kept"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changed, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingError, match=words):
        ship(nn.Linear(3, 3), None, **{"example": torch.ones(1, 3), "to": "net.anymask"} | changed)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("number", "values", "words"),
    [
        (float("nan"), "float16", "not finite"),
        (1e6, "float16", "float16 cannot hold"),
        (3.4e38, "bfloat16", "bfloat16 cannot hold"),
    ],
)
def test_numbers_that_a_file_cannot_hold_are_refused(number, values, words, tmp_path):
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.weight[0, 0] = number
    with pytest.raises(SettingError, match=words):
        ship(model, None, example=torch.ones(1, 2), to=tmp_path / "net.anymask", values=values)


def test_a_file_that_would_compute_something_else_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(making, "Program", lambda plan: lambda x: Program(plan)(x) + 1)
    with pytest.raises(AnymaskError, match="gives other outputs than the model, by up to 1"):
        ship(nn.Linear(2, 2), None, example=torch.ones(1, 2), to=tmp_path / "net.anymask", values="float32")
    assert not list(tmp_path.iterdir())


# -- the other formats ---------------------------------------------------------------------------------------------


def test_safetensors_holds_the_plain_state_dict(batch, tmp_path):
    from safetensors.torch import load_file

    model = network("demonet")
    done = ship(model, None, example=batch, to=tmp_path / "net.safetensors")
    state = load_file(done.path)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    kept = sum(int((weight != 0).sum()) for weight in state.values() if weight.ndim > 1)
    assert (done.kept, done.difference, done.bytes) == (kept, None, done.path.stat().st_size)


def test_onnx_runs_in_onnx_runtime_for_batches_of_any_size(batch, tmp_path):
    pytest.importorskip("onnxscript", reason="pip install 'anymask[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install 'anymask[onnx]'")
    from anymask.shipping.onnxfile import Session

    model = network("resnet20-0.5x")
    done = ship(model, None, example=batch[:1], to=tmp_path / "net.onnx")
    assert done.difference < 1e-4
    assert close(Session(done.path, threads=1)(batch.numpy()), model(batch), within=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_without_onnx_it_is_said_what_to_install(batch, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(SettingError, match=r"pip install 'anymask\[onnx\]'"):
        ship(plain(network("demonet")), None, example=batch, to=tmp_path / "net.onnx")


def test_a_model_whose_ghosts_still_act_is_shipped_without_them(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(3, 1, 8, 8)
    recipe = Recipe((GhostActivation(), GhostSkip(kind="learned")))
    running = recipe.attach(model, optimizer, total_steps=9, example=x)
    for suffix in (".anymask", ".safetensors"):
        ship(model, None, example=x, to=tmp_path / f"early{suffix}", values="float32")
    running.finish(early=True)
    for suffix in (".anymask", ".safetensors"):
        ship(model, None, example=x, to=tmp_path / f"late{suffix}", values="float32")
        assert (tmp_path / f"early{suffix}").read_bytes() == (tmp_path / f"late{suffix}").read_bytes()
