"""Files in the layout of the authors' and of the lessons': the right numbers, or one line that says what is wrong."""

import pytest
import torch
from authors import authors_file
from reference import assert_close, wave
from test_network import CASES, reference_net

from edm import checkpoint
from edm.errors import UserError
from edm.generate import build_denoiser

pytestmark = pytest.mark.usefixtures("authors_module")


def check_numbers(case, path):
    """The network in a file gives the reference numbers, to float32's precision."""
    contents = checkpoint.read(path)
    net = build_denoiser(checkpoint.read_config(contents, path))
    checkpoint.load_weights(net, contents["ema"], path)
    res, channels = case["img_resolution"], case["img_channels"]
    x = wave(2, channels, res, res, scale=0.5, frequency=0.7, phase=0.3)
    labels = torch.eye(10)[[3, 7]] if case["label_dim"] else None
    augment_labels = wave(2, case["augment_dim"], scale=0.3, frequency=1.1, phase=0.2)
    with torch.no_grad():
        D = net.double().eval()(x, torch.tensor([0.05, 1.7], dtype=torch.float64), labels, augment_labels)
    assert_close(D.flatten()[:8], case["denoised"]["first"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['architecture']}-{case['preconditioning']}")
def test_a_file_in_the_authors_layout_gives_their_numbers(case, tmp_path):
    check_numbers(case, authors_file(tmp_path / "network.pkl", case))


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 5])
def test_every_pickle_protocol_is_read(protocol, tmp_path):
    check_numbers(CASES[1], authors_file(tmp_path / "network.pkl", CASES[1], protocol))


@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[2]], ids=["edm", "vp", "ncsnpp"])
def test_a_lessons_checkpoint_gives_the_numbers(case, tmp_path, capsys):
    weights = {f"_score_network.{name}": tensor for name, tensor in reference_net(case).float().state_dict().items()}
    weights["_score_network.model.enc.8x8_down.conv0.resample_filter"] = torch.ones(
        1, 1, *2 * [4 if "ncsn" in case["architecture"] else 2]
    )
    config = {
        "diffusion": {"score_network": {"target": f"lesson.diffusion.{case['preconditioning']}", "params": {}}},
        "epochs": 3,
    }
    torch.save({"model_state_dict": weights, "config": config, "step": 20000}, tmp_path / "diffusion-20000.pt")
    check_numbers(case, tmp_path / "diffusion-20000.pt")
    assert checkpoint.read(tmp_path / "diffusion-20000.pt")["step"] == 20000
    assert capsys.readouterr().out == ""
    torch.save({"model_state_dict": weights}, tmp_path / "silent.pt")
    assert checkpoint.read(tmp_path / "silent.pt")["config"]["preconditioning"]["formulation"] == "edm"
    assert "does not say how it is preconditioned; taken as edm" in capsys.readouterr().out


def test_sampling_and_exporting(script, tmp_path):
    path = authors_file(tmp_path / "edm-tiny-cond-vp.pkl", CASES[1])
    code, _, err = script("sample.py", "--checkpoint", path, "--num_samples", 2, "--sampling_steps", 2)
    assert (code, err.count("Traceback")) == (0, 0)
    assert (tmp_path / "output/image/image_folder/sample/edm-tiny-cond-vp/grid.png").exists()
    assert script("sample.py", "--checkpoint", path, "--export", "small.pt")[0] == 0
    small, large = torch.load(tmp_path / "small.pt", weights_only=True), checkpoint.read(path)
    assert small["config"]["network"]["label_dim"] == 10
    for name, tensor in large["ema"].items():
        assert torch.equal(small["ema"][name], tensor.half() if tensor.ndim > 1 else tensor)
    assert script("sample.py", "--checkpoint", "small.pt", "--num_samples", 2, "--sampling_steps", 2)[0] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"sigma_data": None},
        {"sigma_data": "x"},
        {"class_name": "VPPrecond", "beta_d": None},
        {"class_name": "VPPrecond", "M": 10**400},
    ],
)
def test_odd_attributes_end_in_one_line(change, tmp_path):
    with pytest.raises(UserError, match="is damaged"):
        checkpoint.read(authors_file(tmp_path / "network.pkl", CASES[0], **change))


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(3).to_sparse(),
        torch.zeros(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64),
        torch.zeros(1).expand(2**40),
    ],
    ids=["sparse", "meta", "complex", "expanded"],
)
def test_odd_tensors_end_in_one_line(tensor, tmp_path):
    torch.save({"model_state_dict": {"_score_network.model.out_conv.weight": tensor}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="not a table of tensors"):
        checkpoint.read(tmp_path / "x.pt")
    torch.save({"step": 1, "name": "x", "config": {}, "ema": {"weight": tensor}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its ema is not a table of tensors"):
        checkpoint.read(tmp_path / "x.pt")


def test_what_the_file_says_of_itself_is_kept_or_must_be_so(tmp_path):
    contents = checkpoint.read(authors_file(tmp_path / "network.pkl", CASES[0], sigma_data=0.3))
    assert contents["config"]["preconditioning"]["sigma_data"] == 0.3
    assert contents["config"]["network"]["dropout"] == 0.1
    with pytest.raises(UserError, match=r"it says channel_mult \[1, 4\], but its weights have \(1, 2\)"):
        checkpoint.read(authors_file(tmp_path / "network.pkl", CASES[0], _init_kwargs={"channel_mult": [1, 4]}))
    weights = {f"_score_network.{name}": tensor for name, tensor in reference_net(CASES[0]).state_dict().items()}
    torch.save({"model_state_dict": weights, "config": {"a": [{"sigma_data": 0.25}, "x.EDMPrecond"]}}, tmp_path / "x.pt")
    assert checkpoint.read(tmp_path / "x.pt")["config"]["preconditioning"]["sigma_data"] == 0.25


@pytest.mark.parametrize("keep", [1, 100, -1, -1000])
def test_truncated_pickles_are_recognised(keep, tmp_path):
    path = authors_file(tmp_path / "network.pkl", CASES[0])
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"network\.pkl is damaged, or not a checkpoint"):
        checkpoint.read(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_name": "Generator"}, "unknown network 'Generator'"),
        ({"class_name": "VPPrecond", "beta_d": 5.0}, "its beta_d is 5.0, and only 19.9 is known here"),
    ],
)
def test_networks_of_another_kind_are_refused(change, message, tmp_path):
    with pytest.raises(UserError, match=message):
        checkpoint.read(authors_file(tmp_path / "network.pkl", CASES[0], **change))


def test_other_weights_are_refused(tmp_path, capsys):
    torch.save({"model_state_dict": {"_score_network.model.weight": torch.zeros(3)}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its network is none of ddpmpp, ncsnpp, adm"):
        checkpoint.read(tmp_path / "x.pt")
    torch.save({"model_state_dict": {"_score_network.model.weight": 3}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="its weights are not a table of tensors"):
        checkpoint.read(tmp_path / "x.pt")
    weights = {f"_score_network.{name}": tensor for name, tensor in reference_net(CASES[0]).state_dict().items()}
    torch.save({"model_state_dict": weights, "config": ["VPPrecond", {"preconditioning": "edm"}]}, tmp_path / "x.pt")
    checkpoint.read(tmp_path / "x.pt")
    assert "names several formulations (edm, vp); taken as edm" in capsys.readouterr().out
    weights["_score_network.model.enc.8x8_down.conv0.resample_filter"] = torch.ones(1, 1, 4, 4)
    torch.save({"model_state_dict": weights, "config": {}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="does not have the 2 taps of ddpmpp"):
        checkpoint.read(tmp_path / "x.pt")
