"""What a command is filled in with: the recipe of a size, a micro-batch that fits, and what --init carries over."""

import json

import numpy as np
import pytest
import torch

import sample
import train
from terdit import Config, DiT, load_model, pack_model, save_checkpoint
from tests.helpers import RELEASED, SMALL, awake, run, short_training  # noqa: F401


def settings(*flags):
    return train.make_config(train.parse_args(list(flags)))[:2]


# Recipes --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, images",
    [
        (["--size", "tiny"], 72_000),
        (["--size", "600M"], 448_000_000),
        (["--size", "4.2B"], 604_160_000),
        (["--size", "4.2B", "--image-size", "512"], 696_320_000),
    ],
)
def test_each_size_sees_the_papers_number_of_images(flags, images):
    cfg, _ = settings(*flags)
    assert cfg.batch * cfg.steps == images
    assert settings(*flags, "--steps", "7", "--batch", "3")[0].steps == 7  # the command has the last word


def test_qk_norm_is_for_the_papers_sizes():
    assert settings("--size", "600M")[1].qk_norm
    assert not settings("--size", "600M", "--no-qk-norm")[1].qk_norm
    assert not settings("--size", "tiny")[1].qk_norm
    assert settings("--size", "tiny", "--qk-norm")[1].qk_norm


def test_decay_ends_in_the_middle_above_the_demos_sizes():
    decays = {}
    for size in ("tiny", "S"):
        cfg, config = settings("--size", size, "--decay", "0.1", "--steps", "100")
        with torch.device("meta"):
            optimizer = train.make_optimizer(DiT(config), cfg)
        for step in (0, 49, 50, 99):
            train.set_learning_rate(optimizer, cfg, step)
            decays[size, step] = max(group["weight_decay"] for group in optimizer.param_groups)
    assert [decays["tiny", step] for step in (0, 49, 50, 99)] == [0.1, 0.1, 0.1, 0.1]
    assert [decays["S", step] for step in (0, 49, 50, 99)] == [0.1, 0.1, 0, 0]


# Memory ---------------------------------------------------------------------------------------------------------------


def micro_batch_with(free, monkeypatch, *flags):
    monkeypatch.setattr(train, "free_memory", lambda device: free)
    cfg, config = settings(*flags)
    return train.choose_micro_batch(config, cfg, world=1)


def test_the_micro_batch_is_what_fits(monkeypatch, capsys):
    flags = ["--size", "600M", "--device", "cpu", "--dtype", "bf16"]
    sizes = {gb: micro_batch_with(gb * 1e9, monkeypatch, *flags) for gb in (16, 24, 100)}
    assert 1 <= sizes[16] <= 2 < sizes[24] == 4
    assert sizes[100] == 4  # on a CPU no more, so that a step shows life
    shown = capsys.readouterr().out
    assert "16.0 GB are free" in shown and "GB for 4 images at a time" in shown


def test_a_run_that_cannot_fit_is_refused_before_it_starts(monkeypatch, tmp_path):
    flags = ["--size", "600M", "--device", "cpu"]
    with pytest.raises(ValueError, match=r"needs 1\d\.\d GB for 1 images .* 8.0 GB are free. Try --checkpointing"):
        micro_batch_with(8e9, monkeypatch, *flags)
    with pytest.raises(ValueError, match="Try more GPUs"):
        micro_batch_with(8e9, monkeypatch, *flags, "--checkpointing")
    assert micro_batch_with(8e9, monkeypatch, *flags, "--micro-batch", "1") == 1  # the formula is not believed blindly


def test_the_formula_against_a_run():
    from tests.bench_memory import measure

    row = measure("tiny", "bf16", checkpointing=False)
    assert row["formula"] == pytest.approx(row["measured"], rel=0.25)  # the process's own ups and downs are 10 MB


def test_a_resumed_run_keeps_its_micro_batch(tmp_path, monkeypatch):
    flags = ["--batch", "4", "--steps", "2"]
    run(tmp_path, *flags, "--micro-batch", "2")
    state = run(tmp_path, "--batch", "4", "--steps", "3")
    assert state["micro_batch"] == 2


def test_out_of_memory_is_one_line():
    def too_much():
        torch.empty(1 << 60, dtype=torch.uint8)

    def numpy_too_much():
        raise MemoryError("Unable to allocate 8.00 EiB")

    def other_fault():
        raise RuntimeError("a fault of ours")

    for main in (too_much, numpy_too_much):
        with pytest.raises(SystemExit, match="error: out of memory .* Try a smaller --micro-batch"):
            sample.run_main(main)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        sample.run_main(other_fault)


def test_a_long_step_shows_life(tmp_path, monkeypatch, capsys):
    clock = iter(range(0, 10**6, 20))  # each look at the clock is 20 s later
    monkeypatch.setattr(train.time, "time", lambda: next(clock))
    run(tmp_path, "--batch", "8", "--micro-batch", "2", "--steps", "2", "--size", "tiny")
    shown = capsys.readouterr().out
    assert "step 1/2: 2 of 8 images, " in shown and "s an image, ETA" in shown


def test_durations():
    assert train.duration(211) == "0:03:31"
    assert train.duration(12.4 * 86400) == "12 days"
    assert train.duration(171 * 365 * 86400) == "171 years"


# --init ---------------------------------------------------------------------------------------------------------------


def test_labels_of_the_same_classes_are_kept_in_our_order():
    table = torch.arange(4.0)[:, None]  # rows of cat, dog, eel, and the null label
    state = {"y_embedder.embedding_table.weight": table}
    kept = train.match_labels(state, "x.pt", ["cat", "dog", "eel"], ["eel", "cat", "dog"])
    assert kept["y_embedder.embedding_table.weight"].flatten().tolist() == [2, 0, 1, 3]
    assert train.match_labels(state, "x.pt", ["cat", "dog", "eel"], ["cat", "dog"]) == {}


def test_imagenets_folders_match_a_released_models_rows(capsys):
    names = sorted(str(i) for i in range(1000))  # row 121 is class 207
    state = {"y_embedder.embedding_table.weight": torch.arange(1001.0)[:, None]}
    folders = [f"n{10_000_000 + 7 * i}" for i in range(1000)]
    rows = train.match_labels(state, "TerDiT", names, folders)["y_embedder.embedding_table.weight"].flatten().tolist()
    assert rows[207] == 121 and rows[2] == 112 and rows[1000] == 1000
    assert "the 1000 classes of TerDiT, in the order of --data" in capsys.readouterr().out


def test_the_place_of_init_does_not_matter(tmp_path):
    run(tmp_path / "source", "--steps", 1)
    flags = ["--lr", "1e-3"]
    run(tmp_path / "tuned", "--steps", 1, *flags, "--init", tmp_path / "source/packed.pt")
    (tmp_path / "source").rename(tmp_path / "moved")
    state = run(tmp_path / "tuned", "--steps", 2, *flags, "--init", tmp_path / "moved/packed.pt")
    assert state["step"] == 2
    run(tmp_path / "other", "--steps", 1, "--seed", 1)
    with pytest.raises(ValueError, match="was trained with other weights of --init"):
        run(tmp_path / "tuned", "--steps", 3, *flags, "--init", tmp_path / "other/packed.pt")


@torch.no_grad()
def test_from_full_precision_the_norm_is_added_at_the_size_that_was_there(tmp_path):
    torch.manual_seed(3)
    full = awake(DiT(Config(**SMALL, ternary=False, adaln_norm=False)))
    save_checkpoint(tmp_path / "full.pt", full)
    base, state = train.read_init(tmp_path / "full.pt")
    model = train.build_model(Config(**SMALL), state, "full.pt")
    c = full.t_embedder(torch.linspace(0, 999, 50)) + full.y_embedder.embedding_table.weight.mean(0)
    for ours, theirs in zip(model.layers, full.layers):
        gain = ours.adaLN_modulation[2].weight
        want = theirs.adaLN_modulation(c).square().mean().sqrt()
        assert torch.allclose(gain, want.expand_as(gain), rtol=1e-4)
        assert torch.equal(ours.attention.wq.weight, theirs.attention.wq.weight)
    cfg, config = settings("--init", str(tmp_path / "full.pt"))
    assert config.ternary and config.adaln_norm
    assert not settings("--init", str(tmp_path / "full.pt"), "--full-precision")[1].adaln_norm


# Released folders and sampling ----------------------------------------------------------------------------------------


def test_rows_of_released_models():
    """TerDiT's class_to_idx.json orders indices as strings; Large-DiT's labels are rows."""
    state = torch.load(RELEASED["terdit"] / "consolidated_ema_ternary.00-of-01.pth", weights_only=True)
    n = len(state["y_embedder.embedding_table.weight"]) - 1
    assert load_model(RELEASED["terdit"], n_heads=4).config.class_names == sorted(map(str, range(n)))
    large = load_model(RELEASED["large"], n_heads=4).config
    assert large.class_names == [str(i) for i in range(large.num_classes)]
    imagenet = Config(class_names=[str(i) for i in range(1000)], ternary=False)
    assert sample.pick_classes(["207"], imagenet) == [207]


@torch.no_grad()
def test_guided_channels():
    model = awake(DiT(Config(**SMALL | dict(in_channels=4))))
    y = [0, 1]

    def images(**kwargs):
        return sample.sample_latents(model, y, [0, 1], steps=2, cfg_scale=3.0, **kwargs)

    everything = images()
    assert torch.equal(images(guided_channels=4), everything)
    assert not torch.allclose(images(guided_channels=3), everything)


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_only_products_are_in_bf16(packed):
    model = awake(DiT(Config(**SMALL, qk_norm=True)))
    want = model(torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5]))
    seen = {}

    def note(name):
        def hook(module, inputs, out):
            seen[name] = out.dtype

        return hook

    if packed:
        model = pack_model(model)
    model.set_product_dtype(torch.bfloat16)
    for name in ("x_embedder", "layers.0", "layers.0.adaLN_modulation", "layers.0.attention.wq", "final_layer.linear"):
        model.get_submodule(name).register_forward_hook(note(name))
    model(torch.randn(2, 3, 8, 8), torch.tensor([3, 900]), torch.tensor([0, 5]))
    assert seen.pop("layers.0.attention.wq") == torch.bfloat16
    assert set(seen.values()) == {torch.float32}
    assert want.dtype == torch.float32


def test_full_precision_that_becomes_ternary_has_its_own_recipe(tmp_path):
    for name, ternary in (("full.pt", False), ("ternary.pt", True)):
        config = Config(**SMALL | dict(prediction="v"), ternary=ternary, adaln_norm=ternary)
        save_checkpoint(tmp_path / name, DiT(config))
    full = ["--init", str(tmp_path / "full.pt")]
    assert settings(*full)[0].lr == train.FINE_TUNE.lr == train.DEMO.lr / 2
    assert settings(*full, "--lr", "1e-3")[0].lr == 1e-3
    assert settings(*full, "--full-precision")[0].lr == train.DEMO.lr
    assert settings("--init", str(tmp_path / "ternary.pt"))[0].lr == train.DEMO.lr


def test_a_cache_of_512_pixels_has_its_own_recipe(tmp_path):
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 4, 64, 64), np.float16))
    np.save(tmp_path / "labels.npy", np.zeros(1, np.int64))
    header = dict(format=train.CACHE, image_size=512, vae="v", class_names=["a"], latent_scale=1.0, source="x")
    (tmp_path / "header.json").write_text(json.dumps(header))
    cfg, config = settings("--size", "4.2B", "--data", str(tmp_path))
    assert (cfg.steps, cfg.image_size, config.input_size) == (1_360_000, 512, 64)
