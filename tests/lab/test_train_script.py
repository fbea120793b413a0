"""train_mnist.py: its arguments, every config of the repository, sigma_data, and the lines that end in none."""

import math

import pytest

from lab import checkpoint
from lab import config as configs
from lab.cli import UserError
from lab.data import as_tensors, open_dataset


def test_a_run_says_what_it_does_and_what_to_do_next(script, tiny):
    code, out, err = script("train_mnist.py", "--config_path", tiny, "--device", "cpu")
    assert code == 0
    folder = "output/image/image_folder/tiny"
    assert out.startswith(f"tiny: 0.05 M parameters, 13 images of image_folder, on cpu in float32, to {folder}\n")
    assert f"Next: python sample.py --checkpoint {folder}/diffusion-6.pt --num_samples 4 --gif\n" in out
    assert "6/6" in err  # the progress bar


def test_flags_stand_for_entries_of_the_config(tiny, image_folder, script, monkeypatch):
    seen = []
    monkeypatch.setattr("lab.learner.Learner.__init__", lambda learner, config, device, world: seen.append(config) or 1 / 0)
    image_folder.rename(image_folder.with_name("1e3"))
    flags = ("--num_training_steps", 5, "--batch_size", 2, "--save_and_sample_every_n", 7)
    flags += ("--mixed_precision", "bf16", "--seed", 9, "--data_root", "1e3")
    with pytest.raises(ZeroDivisionError):
        script("train_mnist.py", "training.adam_eps=3e-4", "--config_path", tiny, *flags, "ema.rampup_ratio=0.1")
    training = ["num_training_steps=5", "batch_size=2", "save_and_sample_every_n=7", "mixed_precision=bf16", "seed=9"]
    entries = [*(f"training.{entry}" for entry in training), "training.adam_eps=3e-4", "ema.rampup_ratio=0.1", "data.root=1e3"]
    assert seen == [configs.load(tiny, entries)]


BAD_CALLS = {
    "--config_path none.yaml": "cannot read the config none.yaml: No such file",
    "--bach_size 3": "did you mean --batch_size",
    "--device cuda:99": "'cuda:99' is not on this machine; allowed: cpu",
    "--data_root nowhere": "'nowhere' is not a folder",
    "network.label_dim=1": "has 2 classes, more than the network's 1",
    "loss.noise_distribution=ddpm chain.num_timesteps=20": "chain.num_timesteps: 20",
    "sampler.guide=a.pt": "sampler.guide: training draws its samples without a guide",
    "sampler.solver=ddim preconditioning.formulation=vp": "sampler: the formulation vp does not know the noise",
    "--resume_from latest": "no whole checkpoint",
    "--resume_from none.pt": "there is no checkpoint none.pt",
    "--resume_from tiny.yaml": "tiny.yaml is damaged, or not a checkpoint",
    "--resume_from EXPORTED": "--load_model_weights_from_checkpoint",
    "--resume_from a.pt --load_model_weights_from_checkpoint b.pt": "--resume_from goes on with its own weights",
    "--output_dir tiny.yaml": "cannot write to tiny.yaml/image/image_folder/tiny: Not a directory",
}


@pytest.mark.parametrize(("call", "message"), BAD_CALLS.items(), ids=range(len(BAD_CALLS)))
def test_a_bad_call_ends_in_one_line_and_exit_code_2(script, tiny, trained, tmp_path, call, message):
    if "EXPORTED" in call:
        assert script("sample.py", "--checkpoint", trained, "--export", "EXPORTED")[0] == 0
    code, _, err = script("train_mnist.py", *["--config_path", "tiny.yaml"] * ("--config_path" not in call), *call.split())
    assert code == 2
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not list(tmp_path.rglob("*.jsonl"))


# sigma_data


def test_sigma_data_auto_is_measured_once_and_for_all(train, tiny, image_folder, last, same):
    """On the training images; the checkpoint carries the number, and training goes on with it."""
    auto = train(tiny, "preconditioning.sigma_data=auto", "--num_training_steps", 3)
    images, _ = as_tensors(open_dataset(configs.load(tiny)))
    measured = math.sqrt((images.double() / 127.5 - 1).square().mean().item())
    number = last(auto)["config"]["preconditioning"]["sigma_data"]
    assert number == pytest.approx(measured, rel=1e-9)
    assert number != pytest.approx(0.5, rel=0.1)
    named = train(tiny, f"preconditioning.sigma_data={number}", "--num_training_steps", 3, output="named")
    assert same(last(auto), last(named))

    train(tiny, "preconditioning.sigma_data=auto", "--resume_from", "latest")
    for path in (image_folder / "light").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"no run can go on from .* with another preconditioning.sigma_data \("):
        train(tiny, "preconditioning.sigma_data=auto", "--resume_from", "latest")


@pytest.mark.parametrize("path", sorted(configs.CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_lesson_takes_a_step_and_draws_a_picture(train, mnist_folder, path):
    config = configs.load(path)
    small = ["data.dataset=mnist", f"network.model_channels={min(config.network.model_channels, 16)}", "network.num_blocks=1"]
    small += ["training.batch_size=2", "training.accumulation=1", "sampler.num_samples=1", "sampler.sampling_steps=2"]
    folder = train(path, *small, "--num_training_steps", 1, "--data_root", mnist_folder)
    assert checkpoint.load(folder / "diffusion-1.pt")["losses"][0, 0].isfinite()
    assert (folder / "sample-1.png").exists()
