"""What apo-doctor finds on this machine, and on others that are made up."""

from __future__ import annotations

import json
import socket
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from apo_megatron import doctor
from apo_megatron.config import RLConfig, load_config
from apo_megatron.diagnosis import check_command, gpus, host, installed, packages, run_config, storage
from apo_megatron.diagnosis.check_command import EXIT_PROBLEM
from apo_megatron.diagnosis.finding import Finding
from apo_megatron.parallel.device_facts import Driver, Gpu, TorchDevices, read_driver, read_topology
from tests.tiny_models import make_tiny_model

H100 = Gpu("H100", 80 * 2**30, "sm_90")


def run_doctor(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, Any]]:
    code = doctor.main([*words, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_this_machine_can_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_doctor(capsys, "--run-dir", str(tmp_path / "not" / "there"))
    problems = [finding for finding in found["findings"] if finding["status"] == "problem"]
    assert (code, problems, found["num_problems"]) == (0, [], 0)
    sections = {finding["section"] for finding in found["findings"]}
    assert sections == {"Packages", "GPUs", "Machine", "Run directory"}
    assert all(finding["advice"] for finding in found["findings"] if finding["status"] == "warning")
    assert list(tmp_path.iterdir()) == []


def test_findings_are_printed_with_advice_and_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up = [Finding("A", "x", "ok", "fine"), Finding("A", "y", "problem", "[broken]", "mend it")]
    monkeypatch.setattr(check_command, "find", lambda options: made_up)
    assert doctor.main([]) == EXIT_PROBLEM
    shown = capsys.readouterr().out
    assert "[broken]" in shown and "-> mend it" in shown and "2 checks: 1 problem, 0 warnings" in shown


# --- packages


def distribution(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    (info / "METADATA").write_text(
        "\n".join([*lines, *(f"Requires-Dist: {line}" for line in requires)]) + "\n"
    )


def test_unmet_requirements_are_found_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(tmp_path, "made-root", "1", ("made_middle[fast]>=2", "absent; extra == 'other'", "gone>=1"))
    distribution(tmp_path, "made_middle", "2.1", ("made-leaf<2; extra == 'fast'", "made-root"))
    distribution(tmp_path, "made-leaf", "2.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert set(installed.unmet_requirements("made-root")) == {
        ("made-root", "gone>=1", None),
        ("made_middle", "made-leaf<2", "2.0"),
    }


def test_ranges_are_those_of_the_installed_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        installed.metadata, "requires", lambda name: ["torch>=999"] if name == packages.OURS else []
    )
    (finding,) = packages.check_required()
    assert (finding.status, finding.subject) == ("problem", "torch")
    assert "apo_megatron wants torch>=999" in finding.message and 'pip install "torch>=999"' in finding.advice


def test_an_optional_package_of_a_wrong_version_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ['rich>=999; extra == "gpu"', 'no-such-package; extra == "x"', 'pytest>=999; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines if name == packages.OURS else [])
    found = {finding.subject: finding.status for finding in packages.check_optional(skip=set())}
    assert found == {"rich": "problem", "no-such-package": "ok"}


def test_packages_that_are_not_installed_are_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "OURS", "no-such-distribution")
    (finding,) = packages.check_packages()
    assert finding.status == "warning" and "not installed" in finding.message


@pytest.mark.parametrize(
    ("files", "status", "message"),
    [
        (["apex/__init__.py"], "problem", "is not NVIDIA Apex"),
        (
            ["apex/__init__.py", "apex/multi_tensor_apply/__init__.py"],
            "warning",
            "without its compiled kernels",
        ),
        (["apex/__init__.py", "apex/multi_tensor_apply/__init__.py", "amp_C.py"], "ok", "NVIDIA Apex"),
    ],
)
def test_the_real_apex_is_recognised(
    files: list[str], status: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    finding = packages.check_apex()
    assert finding.status == status and message in finding.message


def test_another_python_is_asked_for_sglang(tmp_path: Path) -> None:
    finding = packages.check_other_python(str(tmp_path / "python"))
    assert finding.status == "problem" and "cannot be run" in finding.message
    finding = packages.check_other_python(sys.executable)  # SGLang has an environment of its own
    assert finding.status == "problem" and "has no sglang" in finding.message


# --- GPUs


def devices(*gpus: Gpu, cuda: str | None = "12.8") -> TorchDevices:
    return TorchDevices(cuda, "2.27.3" if cuda else None, ("sm_80", "sm_90"), gpus, ())


@pytest.mark.parametrize(
    ("found", "driver", "status", "message"),
    [
        (devices(cuda=None), None, "ok", "no NVIDIA GPU here"),
        (devices(cuda=None), Driver("570.1", "12.8", 2, {}), "problem", "CPU build"),
        (devices(cuda="13.0"), Driver("570.1", "12.8", 2, {}), "problem", "serves CUDA up to 12.8"),
        (devices(cuda="12.9"), Driver("570.1", "12.8", 2, {}), "problem", "sees none of the 2"),
        (devices(cuda="12.9"), Driver("570.1", "N/A", 2, {}), "problem", "sees none of the 2"),
        (devices(H100), Driver("570.1", "12.8", 1, {}), "ok", "driver 570.1"),
        (devices(H100), None, "ok", "nvidia-smi is not here"),
    ],
)
def test_driver_against_build(found: TorchDevices, driver: Driver | None, status: str, message: str) -> None:
    finding = gpus.check_build(found, driver)
    assert finding.status == status and message in finding.message
    assert bool(finding.advice) == (status != "ok")


def test_a_gpu_without_kernels_is_a_problem() -> None:
    blackwell = Gpu("B200", 180 * 2**30, "sm_100")
    statuses = [finding.status for finding in gpus.check_devices(devices(H100, H100, blackwell))]
    assert statuses == ["ok", "problem", "warning"]  # the last one: they differ
    built = TorchDevices("12.8", "2.27.3", ("sm_80", "compute_90"), (), ())
    assert built.has_kernels_for(blackwell)  # compiled when it is loaded
    assert built.has_kernels_for(Gpu("RTX", 1, "sm_86")) and not built.has_kernels_for(Gpu("T4", 1, "sm_75"))


TOPOLOGY = """\t\x1b[4mGPU0\tGPU1\tGPU2\tNIC0\tCPU Affinity\x1b[0m
GPU0\t X \tNV18\tSYS\tPIX\t0-31
GPU1\tNV18\t X \tSYS\tSYS\t0-31
GPU2\tSYS\tSYS\t X \tSYS\t32-63
NIC0\tPIX\tSYS\tSYS\t X

Legend:
  X    = Self
"""


def test_topology_is_read_and_judged() -> None:
    links = read_topology(TOPOLOGY)
    assert links == {(0, 1): "NV18", (0, 2): "SYS", (1, 2): "SYS"}
    three = devices(H100, H100, H100)
    (finding,) = gpus.check_links(three, Driver("1", "12.8", 3, links))
    assert finding.status == "warning" and "SYS for 2 pair(s)" in finding.message
    (finding,) = gpus.check_links(devices(H100, H100), Driver("1", "12.8", 2, {(0, 1): "NV18"}))
    assert finding.status == "ok"
    assert list(gpus.check_links(devices(H100), None)) == [] and read_topology("Failed") == {}


def test_driver_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in topo) printf "GPU0 X NV4\\nGPU1 NV4 X\\n" ;; --list-gpus) printf "0\\n1\\n" ;;\n'
        '*) echo "| NVIDIA-SMI 570.86   Driver Version: 570.86   CUDA Version: 12.8 |" ;; esac\n'
    )
    program.chmod(0o755)
    assert read_driver() == Driver("570.86", "12.8", 2, {(0, 1): "NV4"})
    program.write_text("#!/bin/sh\nexit 9\n")
    assert read_driver() is None


def test_another_nccl_than_torch_came_with_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "version_of", lambda name: {"nvidia-nccl-cu12": "2.26.2"}.get(name))
    assert gpus.check_nccl(devices(H100)).status == "warning"
    monkeypatch.setattr(gpus, "version_of", lambda name: {"nvidia-nccl-cu12": "2.27.3.post1"}.get(name))
    assert gpus.check_nccl(devices(H100)).status == "ok"


def test_a_torch_that_cannot_be_loaded_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(gpus, "import_module", fail)
    (finding,) = gpus.check_gpus()
    assert finding.status == "problem" and "libcudart.so.12" in finding.message


# --- machine


def test_limits_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.check_shared_memory(tmp_path, min_bytes=2**60).status == "warning"
    assert host.check_shared_memory(tmp_path / "missing").status == "problem"
    monkeypatch.setattr(host.resource, "getrlimit", lambda kind: (1024, 4096))
    assert host.check_open_files().status == "warning"
    (tmp_path / "mlx5_0").touch()
    assert host.check_locked_memory().status == "ok"
    monkeypatch.setattr(host, "_INFINIBAND", tmp_path)
    assert host.check_locked_memory().status == "warning"
    (tmp_path / "range").write_text("40000\t40100\n")
    assert host.check_port_range(tmp_path / "range").status == "warning"
    (tmp_path / "quota").write_text("150000 100000\n")
    monkeypatch.setattr(host, "_CPU_QUOTA", tmp_path / "quota")
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda pid: set(range(8)))
    finding = host.check_processors()
    assert finding.status == "warning" and "1.5 for this process, the container's limit" in finding.message


def test_a_port_that_is_taken_is_found() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        assert host.check_port(taken.getsockname()[1]).status == "warning"


def test_names_that_do_not_resolve_are_found() -> None:
    def fail(name: str) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    finding = host.check_host_name(fail)
    assert finding.status == "warning" and "localhost does not resolve" in finding.message


def test_model_cache(tmp_path: Path) -> None:
    (tmp_path / "hub" / "models--a--b").mkdir(parents=True)
    finding = host.check_model_cache({"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"})
    assert finding.status == "ok" and finding.message.endswith("1 model(s), offline")


# --- run directory

MOUNTS = """22 1 8:1 / / rw - ext4 /dev/sda1 rw
40 22 0:50 / /data\\040set rw - lustre mds:/ rw
41 40 0:51 / /data\\040set/tmp rw - tmpfs tmpfs rw
"""


@pytest.mark.parametrize(
    ("folder", "kind", "status"),
    [("/x", "ext4", "ok"), ("/data set/run", "lustre", "ok"), ("/data set/tmp/run", "tmpfs", "warning")],
)
def test_kind_of_file_system(folder: str, kind: str, status: str) -> None:
    assert storage.file_system_of(Path(folder), MOUNTS) == kind
    assert storage.check_kind(Path(folder), MOUNTS).status == status


def test_speed_is_measured_and_judged(tmp_path: Path) -> None:
    speed = storage.measure(tmp_path / "data", 2**22)
    assert speed.write > 0 and speed.read > 0 and (tmp_path / "data").stat().st_size == 2**22
    finding = storage.check_speed(storage.Speed(write=14e6, read=1e9))
    assert finding.status == "warning" and "17 min" in finding.message


def test_a_full_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, num_bytes: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(storage, "measure", fail)
    found = {finding.subject: finding for finding in storage.check_storage(tmp_path)}
    assert found["writing"].status == "problem" and "Disk quota exceeded" in found["writing"].message


# --- a run


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    model = make_tiny_model(folder / "model", "qwen2", num_layers=2)
    rows = [{"prompt": f"w{number} w3", "answer": "w4"} for number in range(5, 9)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model": {"hf_path": str(model)},
        "data": {"train_path": str(folder / "train.jsonl"), "prompts_per_step": 2},
        "reward": {"name": "math_verify"},
        "rollout": {"group_size": 2, "max_new_tokens": 8},
        "train": {"run_dir": str(folder / "out"), "num_steps": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    return folder / "run.yaml"


def test_a_run_is_checked_with_the_machine(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run_doctor(capsys, "check", "--config", str(run_file))
    run = {finding["subject"]: finding for finding in found["findings"] if finding["section"] == "Run"}
    assert code == 0 and {finding["status"] for finding in run.values()} == {"ok"}
    assert run["data and tokenizer"]["message"] == "4 prompts, 0 held out"


@pytest.mark.parametrize(
    ("override", "subject", "message"),
    [
        ("data.train_path=missing.jsonl", "data and tokenizer", "missing.jsonl"),
        ("data.prompt_field=question", "data and tokenizer", "question"),
        ("model.megatron_path=missing", "weights", "no metadata.json there"),
        ("parallel.tensor_parallel_size=3", "plan", "must divide"),
    ],
)
def test_what_a_run_lacks_is_a_problem(override: str, subject: str, message: str, run_file: Path) -> None:
    findings = run_config.findings_of(load_config(RLConfig, run_file, [override]), world_size=1)
    (found,) = [finding for finding in findings if finding.status == "problem"]
    assert found.subject == subject and message in found.message


def test_settings_without_effect_are_a_warning(run_file: Path) -> None:
    overrides = ["objective.loss_mode=cispo", "objective.clip_high=0.4"]
    first, *others = run_config.findings_of(load_config(RLConfig, run_file, overrides), world_size=1)
    assert first.status == "warning"
    assert first.message == "set, but without effect on the methods chosen: objective.clip_high"
    assert {finding.status for finding in others} == {"ok"}


def test_a_layout_of_several_ranks_needs_no_world_size(
    run_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    default = str(check_command.command_parser().parse_args([]).world_size)
    monkeypatch.setattr(sys, "argv", ["", str(run_file), default, "parallel.pipeline_parallel_size=2"])
    run_config.main()
    *_, plan = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert plan["status"] == "ok" and "2 rank(s)" in plan["message"]


def test_a_model_that_is_only_on_the_hub_is_no_problem(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cfg = load_config(RLConfig, run_file, ["model.hf_path=owner/name"])
    (found,) = run_config.findings_of(cfg, world_size=1)
    assert found.status == "warning" and "not in the model cache" in found.message
    cfg = load_config(RLConfig, run_file, ["model.hf_path=/no/such/model"])
    assert {finding.status for finding in run_config.findings_of(cfg, world_size=1)[1:]} == {"problem"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sglang-pyton", "x"], "did you mean --sglang-python?"),
        (["chek"], "invalid choice: 'chek'"),
        (["check", "--config", "missing.yaml"], "missing.yaml: cannot read"),
        (["selftest", "--max-second", "3"], "did you mean --max-seconds?"),
    ],
)
def test_wrong_words(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main(words) == 2
    assert message in capsys.readouterr().err


def test_every_requirement_of_ours_can_be_read() -> None:
    for line in metadata.requires(packages.OURS) or ():
        assert Requirement(line).name
