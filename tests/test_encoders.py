"""Encoders: the right weights in the right places, layers by name, sizes, checkpoints, errors that help."""

import hashlib
import io
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from skimage import data

from hclib.kernels import weights
from hclib.kernels.encoders import PAPER_LAYERS, TIMM_NAMES, available_layers, load_encoder
from hclib.kernels.weights import WeightsError, WeightsMissingError, Wheel, wheel_weights
from hclib.paths import data_roots

VIT = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Write random weights in the shapes of a timm model to a local file; give the file and the weights."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save(name, suffix=".safetensors", wrap=None):
        path = folder / f"{name}{wrap or ''}{suffix}"
        with torch.device("meta"):  # no time spent on an initialisation that is thrown away
            shapes = timm.create_model(name, pretrained=False).state_dict()
        generator = torch.Generator().manual_seed(0)
        state = {key: random_weight(key, value, generator) for key, value in shapes.items()}
        if suffix == ".safetensors":
            save_file(state, path)
        else:
            torch.save({wrap: state} if wrap else state, path)
        return path, state

    return save


def random_weight(name, like, generator):
    if not like.is_floating_point():
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.ndim < 2:
        return torch.rand(like.shape, generator=generator) * 0.1 + (0.0 if name.endswith("bias") else 0.9)
    return torch.randn(like.shape, generator=generator) / like[0].numel() ** 0.5


def loaded(name, state):
    model = timm.create_model(name, pretrained=False).eval()
    model.load_state_dict(state)
    return model


def batch_of(size, count=2, seed=0):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---- layers, tokens, sizes, on small random networks ----


def test_transformer_layers_are_the_residual_stream_without_prefix_tokens(checkpoint, device):
    path, state = checkpoint(VIT)
    encoder = load_encoder(VIT, 96, device, layers=("block3", "norm", "block12"), checkpoint=path)
    batch = batch_of(96)
    maps, tokens = encoder.forward(batch.to(device))
    model = loaded(VIT, state)
    model.set_input_size(img_size=96)
    with torch.inference_mode():
        x = model.norm_pre(model._pos_embed(model.patch_embed(batch)))
        seen = {}
        for number, block in enumerate(model.blocks, 1):
            x = block(x)
            seen[f"block{number}"] = x
        seen["norm"] = model.norm(x)
    assert list(maps) == ["block3", "norm", "block12"]
    for layer, values in maps.items():
        assert values.shape == (2, 6, 6, 192)
        torch.testing.assert_close(values.cpu(), seen[layer][:, 1:].reshape(2, 6, 6, 192), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.cpu(), seen["norm"][:, 0], rtol=1e-4, atol=1e-4)


def test_register_tokens_are_dropped_like_the_class_token(checkpoint):
    path, _ = checkpoint("vit_small_patch14_reg4_dinov2")
    encoder = load_encoder("vit_small_patch14_reg4_dinov2", 56, "cpu", checkpoint=path)
    assert encoder.model.num_prefix_tokens == 5 and encoder.layers == ("block6", "block9")
    maps, tokens = encoder.forward(batch_of(56))
    assert maps["block6"].shape == (2, 4, 4, 384) and tokens.shape == (2, 384)


def test_resnet_layers_are_the_stages_and_the_token_is_the_mean_of_the_last(checkpoint, device):
    path, state = checkpoint("resnet18")
    encoder = load_encoder("resnet18", 64, device, checkpoint=path)
    assert encoder.layers == ("layer2", "layer3") and encoder.token == "layer4.mean"
    batch = batch_of(64)
    maps, tokens = encoder.forward(batch.to(device))
    model = loaded("resnet18", state)
    with torch.inference_mode():
        x = model.maxpool(model.act1(model.bn1(model.conv1(batch))))
        layer2 = model.layer2(model.layer1(x))
        layer3 = model.layer3(layer2)
        layer4 = model.layer4(layer3)
    torch.testing.assert_close(maps["layer2"].cpu(), layer2.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(maps["layer3"].cpu(), layer3.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokens.cpu(), layer4.mean(dim=(2, 3)), rtol=1e-4, atol=1e-4)


def test_wide_resnet_gives_the_widths_of_patchcore(checkpoint):
    path, _ = checkpoint("wide_resnet50_2")
    maps, tokens = load_encoder("wide_resnet50_2", 64, "cpu", checkpoint=path).forward(batch_of(64, 1))
    shapes = {layer: tuple(values.shape) for layer, values in maps.items()}
    assert shapes == {"layer2": (1, 8, 8, 512), "layer3": (1, 4, 4, 1024)} and tokens.shape == (1, 2048)


def test_clip_projects_its_token(checkpoint):
    name = "vit_medium_patch32_clip_224.tinyclip_laion400m"
    path, state = checkpoint(name)
    encoder = load_encoder(name, 64, "cpu", checkpoint=path)
    _, tokens = encoder.forward(batch_of(64))
    assert encoder.token == "norm.head" and tokens.shape == (2, 512)
    encoder.token = "norm.cls"
    _, unprojected = encoder.forward(batch_of(64))
    expected = torch.nn.functional.linear(unprojected, state["head.weight"], state["head.bias"])
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-4)


def test_names_of_the_papers_mean_the_weights_of_the_papers():
    plain = timm.get_pretrained_cfg("vit_large_patch14_clip_336.openai")
    assert "natively QuickGELU" in str(plain.notes)
    own = {name: timm.get_pretrained_cfg(TIMM_NAMES.get(name, name)) for name in (*PAPER_LAYERS, "wide_resnet50_2")}
    assert {name: config.tag for name, config in own.items()} == {
        "vit_large_patch14_clip_336.openai": "openai",
        "vit_base_patch8_224.dino": "dino",
        "vit_base_patch14_reg4_dinov2.lvd142m": "lvd142m",
        "wide_resnet50_2": "tv_in1k",
    }
    assert own["vit_large_patch14_clip_336.openai"].architecture == "vit_large_patch14_clip_quickgelu_336"


@pytest.mark.parametrize(("suffix", "wrap"), [(".safetensors", None), (".pth", None), (".pth", "state_dict")])
def test_checkpoints_of_every_format_load_the_same_weights(checkpoint, suffix, wrap):
    path, state = checkpoint(VIT, suffix, wrap)
    encoder = load_encoder(VIT, 224, "cpu", checkpoint=path)
    own = encoder.model.state_dict()
    assert set(state) - set(own) == {"head.weight", "head.bias"}
    assert all(torch.equal(value, state[name]) for name, value in own.items())
    assert encoder.weights_hash == load_encoder(VIT, 96, "cpu", checkpoint=path).weights_hash


def test_one_changed_weight_changes_the_hash(checkpoint, tmp_path):
    path, state = checkpoint(VIT)
    state["blocks.7.mlp.fc1.bias"][3] += 1e-6
    other = tmp_path / "other.safetensors"
    save_file(state, other)
    assert len({load_encoder(VIT, 96, "cpu", checkpoint=file).weights_hash for file in (path, other)}) == 2


def test_encoder_is_frozen(checkpoint):
    path, _ = checkpoint(VIT)
    encoder = load_encoder(VIT, 96, "cpu", checkpoint=path)
    assert not encoder.model.training and not any(p.requires_grad for p in encoder.model.parameters())


def test_available_layers_of_the_offline_encoders():
    with torch.device("meta"):
        dino, lite = (timm.create_model(name) for name in ("vit_small_patch14_dinov2", "tf_efficientnet_lite0"))
    assert available_layers(dino) == (*(f"block{number}" for number in range(1, 13)), "norm")
    assert available_layers(lite) == ("reduction2", "reduction4", "reduction8", "reduction16", "reduction32")


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_size": 100}, "96 or 112"),
        ({"image_size": 8}, "nearest: 16"),
        ({"layers": ("block13",)}, "no layer 'block13'; available: block1, .*block12, norm"),
        ({"layers": ("block2", "block2")}, "twice"),
        ({"token": "block2.max"}, "no token 'block2.max'"),
        ({"token": "block13.cls"}, "no layer 'block13'"),
    ],
)
def test_wrong_requests_say_what_is_possible(checkpoint, options, message):
    path, _ = checkpoint(VIT)
    with pytest.raises(ValueError, match=message):
        load_encoder(VIT, device="cpu", checkpoint=path, **({"image_size": 96} | options))


def test_unknown_encoder_names_the_known_ones():
    with pytest.raises(ValueError, match="dinov2_vits14, efficientnet_lite0"):
        load_encoder("resnet_of_the_future", device="cpu")


def test_batch_of_another_size_is_refused(checkpoint):
    path, _ = checkpoint(VIT)
    with pytest.raises(ValueError, match=r"expected \(B, 3, 96, 96\)"):
        load_encoder(VIT, 96, "cpu", checkpoint=path).forward(batch_of(112))


def test_bad_checkpoints_are_named(checkpoint, tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        load_encoder(VIT, 96, "cpu", checkpoint=tmp_path / "absent.pth")
    (tmp_path / "text.pth").write_text("not tensors")
    with pytest.raises(WeightsError, match=r"text\.pth cannot be read as plain tensors"):
        load_encoder(VIT, 96, "cpu", checkpoint=tmp_path / "text.pth")
    torch.save({"run": subprocess.Popen}, tmp_path / "code.pth")
    with pytest.raises(WeightsError, match=r"code\.pth cannot be read as plain tensors"):
        load_encoder(VIT, 96, "cpu", checkpoint=tmp_path / "code.pth")
    path, _ = checkpoint("resnet18")
    with pytest.raises(WeightsError, match="does not fit VisionTransformer"):
        load_encoder(VIT, 96, "cpu", checkpoint=path)


def test_hub_without_a_network_asks_for_a_checkpoint(monkeypatch):
    def no_network(*_args, **options):
        assert options["pretrained"]
        raise OSError("no route to host")

    monkeypatch.setattr(timm, "create_model", no_network)
    with pytest.raises(WeightsMissingError, match="no route to host.*pass checkpoint=FILE"):
        load_encoder("wide_resnet50_2", device="cpu")


# ---- wheels ----


@pytest.fixture
def toy_wheel(monkeypatch, tmp_path):
    """A registry with one small wheel, an empty cache, and a pip that copies it and counts its calls."""
    monkeypatch.setenv("HCLIB_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(source, "w") as archive:
        archive.writestr("toy/weights.bin", np.arange(6, dtype=np.float32).tobytes())
    digest = hashlib.sha256(source.read_bytes()).hexdigest()

    def convert(content):
        return {"w": np.frombuffer(content, np.float32).reshape(2, 3).T}

    monkeypatch.setitem(weights.WHEELS, "toy", Wheel("toy==1.0", source.name, digest, "toy/weights.bin", convert))
    calls = []

    def pip(command, **_options):
        calls.append(command)
        if not source.is_file():
            return subprocess.CompletedProcess(command, 1, "", "WARNING: x\nERROR: No matching distribution\n")
        shutil.copy(source, command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(weights.subprocess, "run", pip)
    return source, calls


def test_wheel_is_fetched_once_and_converted(toy_wheel):
    source, calls = toy_wheel
    path = wheel_weights("toy")
    assert torch.equal(load_file(path)["w"], torch.arange(6.0).reshape(2, 3).T)
    source.unlink()  # offline from here on
    assert wheel_weights("toy") == path and len(calls) == 1
    assert {"--no-deps", "toy==1.0"} <= set(calls[0])
    assert sorted(file.name for file in path.parent.iterdir() if not file.name.endswith(".lock")) == [path.name]


def test_failed_download_says_where_to_place_the_wheel_and_placing_it_works(toy_wheel):
    source, calls = toy_wheel
    content = source.read_bytes()
    source.unlink()
    with pytest.raises(WeightsMissingError, match="toy==1.0.*No matching distribution.*place it at") as caught:
        wheel_weights("toy")
    placed = Path(str(caught.value).rsplit(" ", 1)[1])
    placed.parent.mkdir(parents=True)
    placed.write_bytes(content + b"x")
    with pytest.raises(WeightsError, match=r"has SHA-256 .* expected .* remove"):
        wheel_weights("toy")
    placed.write_bytes(content)
    assert wheel_weights("toy").is_file() and len(calls) == 1


def test_onnx_of_another_network_is_refused():
    import onnx

    graph = onnx.helper.make_graph([], "empty", [], [])
    with pytest.raises(WeightsError, match="not the DINOv2 export"):
        weights.dinov2_from_onnx(onnx.helper.make_model(graph).SerializeToString())


# ---- the real weights ----


@pytest.fixture(scope="module")
def dino():
    return load_encoder(device="cpu")


@pytest.mark.slow
def test_lite0_names_the_cat_and_the_coffee():
    model = loaded("tf_efficientnet_lite0", load_file(wheel_weights("efficientnet_lite0")))
    encoder = load_encoder("efficientnet_lite0", device="cpu")
    with torch.inference_mode():
        probabilities = model(encoder.prepare([data.chelsea(), data.coffee()])).softmax(dim=1)
    assert probabilities.argmax(dim=1).tolist() == [285, 967]  # Egyptian cat, espresso
    assert probabilities.amax(dim=1).min() > 0.5


@pytest.mark.slow
def test_lite0_with_two_kinds_of_tensor_swapped_names_neither():
    state = load_file(wheel_weights("efficientnet_lite0"))
    for name in [name for name in state if name.endswith("running_mean")]:
        twin = name.replace("running_mean", "bias")
        state[name], state[twin] = state[twin], state[name]
    encoder = load_encoder("efficientnet_lite0", device="cpu")
    model = loaded("tf_efficientnet_lite0", state)
    with torch.inference_mode():
        named = model(encoder.prepare([data.chelsea(), data.coffee()])).argmax(dim=1)
    assert not set(named.tolist()) & {285, 967}


def test_tensors_in_another_order_are_refused():
    with torch.device("meta"):
        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    state = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in model.state_dict().items()}
    turned = dict(reversed(state.items()))
    contents = []
    for tensors in (state, turned):
        file = io.BytesIO()
        torch.save(tensors, file)
        contents.append(file.getvalue())
    assert list(weights.lite0_from_pth(contents[0])) == list(state)
    with pytest.raises(WeightsError, match="EfficientNet-Lite0 in timm's order"):
        weights.lite0_from_pth(contents[1])


@pytest.mark.slow
def test_dinov2_weights_are_all_there(dino):
    state = load_file(wheel_weights("dinov2_vits14"))
    with torch.device("meta"):
        model = timm.create_model("vit_small_patch14_dinov2", num_classes=0)
    assert set(state) == set(model.state_dict())
    assert state["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    assert dino.weights_hash.startswith("f0a0328e6807")


@pytest.mark.slow
@pytest.mark.parametrize("size", [224, 518])
def test_dinov2_positions_follow_the_grid(size):
    encoder = load_encoder("dinov2_vits14", size, "cpu")
    whole = load_file(wheel_weights("dinov2_vits14"))["pos_embed"]
    own, side = encoder.model.pos_embed, size // 14
    assert own.shape == (1, 1 + side * side, 384) and torch.equal(own[:, 0], whole[:, 0])
    if size == 518:
        torch.testing.assert_close(own, whole)
    else:  # corners of the small grid lie between the first and the third position of the large one
        corner = whole[0, 1:].reshape(37, 37, 384)[:3, :3].mean(dim=(0, 1))
        assert torch.cosine_similarity(own[0, 1], corner, dim=0) > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("layer", ["block6", "block9"])
def test_dinov2_patches_separate_a_cat_from_its_background(layer):
    """The first principal component of the patches tells the cat's head from the wall (boxes set by hand)."""
    encoder = load_encoder("dinov2_vits14", 448, "cpu", layers=(layer,))
    patches = encoder.forward(encoder.prepare([data.chelsea()]))[0][layer][0]  # (32, 32, 384)
    centred = patches.flatten(0, 1) - patches.mean(dim=(0, 1))
    component = (centred @ torch.linalg.svd(centred, full_matrices=False).Vh[0]).reshape(32, 32)
    cat, wall = component[8:24, 10:22].flatten(), component[2:20, 27:].flatten()
    auroc = (cat[:, None] > wall[None]).float().mean().item()
    assert max(auroc, 1 - auroc) > 0.95


@pytest.mark.slow
def test_image_tokens_put_the_categories_of_realmix_apart(dino):
    if not any((root / "realmix.csv").is_file() for root in data_roots()):
        pytest.skip("realmix is not on this machine")
    from hclib.data.datasets import load_index

    index = load_index("realmix")
    index = index[index["split"] == "train"].groupby("category").sample(20, random_state=0)
    batches = np.array_split(index["path"].to_numpy(), len(index) // 8)
    tokens = torch.cat([dino.forward(dino.prepare(batch.tolist()))[1] for batch in batches])
    distances = torch.cdist(tokens, tokens).fill_diagonal_(torch.inf)
    category = index["category"].to_numpy()
    assert (category[distances.argmin(dim=1).numpy()] == category).mean() >= 0.99
