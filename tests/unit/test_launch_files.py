"""What starts a run elsewhere: the image, compose, KubeRay, SkyPilot, the scripts. Nothing is started here.

Linters are pinned in the `dev` extra. KubeRay's schema is not to be had as a package: what its documentation asks of a
RayJob is checked by hand, and the pods in it by Kubernetes' schema where `kubernetes-validate` is installed.
"""

import copy
import re
import shutil
import string
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
DOCKER = ROOT / "docker"
VARIABLES = {"DPSRL_ARGS", "DPSRL_RUN_DIR", "DPSRL_NODES", "DPSRL_GPUS", "DPSRL_IMAGE"}
LAUNCH = "/opt/dpsrl/scripts/launch.py"


def read(name: str, **values: str):
    return yaml.safe_load(string.Template((DOCKER / name).read_text()).safe_substitute(values))


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}")
    return found or pytest.skip(f"{name} is not installed: it comes with the dev extra")


def passes(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# --- linters ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "scripts").glob("*.sh")))
def test_shell_scripts_pass_shellcheck(script):
    passes(tool("shellcheck"), str(ROOT / "scripts" / script))


def test_the_dockerfile_passes_hadolint():
    passes(tool("hadolint"), str(DOCKER / "Dockerfile"))


def test_compose_fits_the_compose_schema():
    passes(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", str(DOCKER / "compose.yaml"))


def test_pods_fit_the_kubernetes_schema():
    validate = pytest.importorskip("kubernetes_validate").validate
    cluster = rayjob()["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}} | group["template"]
        validate(copy.deepcopy(pod), "1.33", strict=True)


# --- one set of variables -----------------------------------------------------------------------------


def test_every_launcher_reads_the_same_documented_variables():
    documented = set(re.findall(r"^\| `(DPSRL_\w+)`", (ROOT / "docs" / "launch.md").read_text(), re.MULTILINE))
    example = set(re.findall(r"^(DPSRL_\w+)=", (DOCKER / "launch.env").read_text(), re.MULTILINE))
    assert example == VARIABLES and VARIABLES <= documented
    own = {"DPSRL_EXTRA", "DPSRL_ROOT"}  # of install.sh, and from slurm.sh to itself
    files = [*DOCKER.iterdir(), ROOT / "scripts" / "slurm.sh", ROOT / "scripts" / "launch.py"]
    used = {name for file in files for name in re.findall(r"DPSRL_[A-Z_]+", file.read_text())}
    assert used <= documented | own
    for name in ("compose.yaml", "rayjob.yaml", "sky.yaml"):
        assert {"DPSRL_ARGS", "DPSRL_RUN_DIR"} <= set(re.findall(r"DPSRL_[A-Z_]+", (DOCKER / name).read_text()))


def test_the_rayjob_needs_no_variable_that_its_first_lines_do_not_name():
    text = (DOCKER / "rayjob.yaml").read_text()
    given = re.search(r"envsubst '([^']*)'", text)[1].replace("$", "").split()
    assert set(re.findall(r"\$\{(\w+)\}", text)) == set(given) == VARIABLES


# --- the image ----------------------------------------------------------------------------------------


def dockerfile() -> list[str]:
    """Instructions, one a line."""
    lines = [line for line in (DOCKER / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    return re.sub(r"\\\n\s*", "", "\n".join(lines)).split("\n")


def test_the_image_is_pinned_runs_as_a_user_and_trains():
    steps = [line for line in dockerfile() if line]
    base = next(line for line in steps if line.startswith("ARG BASE_IMAGE="))
    assert re.fullmatch(r"ARG BASE_IMAGE=\w+:\d+\.\d+-slim", base)
    assert [line for line in steps if line.startswith("USER")] == ["USER 1000:1000"]
    assert steps[-1] == 'ENTRYPOINT ["tini", "--", "python", "-m", "dpsrl.train"]'
    installs = next(place for place, line in enumerate(steps) if "scripts/install.sh" in line and "RUN" in line)
    assert installs < steps.index("COPY . .") < steps.index("USER 1000:1000")  # a change of code installs nothing anew


def test_what_the_image_installs_from_is_all_that_install_sh_reads():
    """The packages' layer is made of few files, so that other files can change without it."""
    copied = [word for line in dockerfile() if line.startswith("COPY") for word in line.split()[1:-1]]
    for name in ("pyproject.toml", "LICENSE", "scripts/install.sh", "dpsrl/__init__.py", "dpsrl/types.py"):
        assert name in copied and (ROOT / name).exists()


def test_the_context_has_the_code_and_not_the_runs():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    kept = {line[1:] for line in lines if line.startswith("!")}
    assert kept == {"LICENSE", "README.md", "pyproject.toml", "configs", "dpsrl", "recipes", "scripts"}
    assert all((ROOT / name).exists() for name in kept)


# --- compose, KubeRay, SkyPilot -----------------------------------------------------------------------


@pytest.mark.parametrize("profile", ["gpu", "cpu"])
def test_compose_runs_the_launcher_on_shared_memory_and_folders(profile):
    service = read("compose.yaml")["services"][profile]
    assert service["profiles"] == [profile] and service["build"]["args"] == {"DPSRL_EXTRA": profile}
    assert service["entrypoint"] == ["tini", "--", "python", LAUNCH]
    assert service["shm_size"].endswith("gb") and service["stop_grace_period"] == "10m"
    targets = [volume["target"] for volume in service["volumes"]]
    assert targets == ["/work/runs", "/work/data", "/work/hf"]
    assert ("deploy" in service) == (profile == "gpu")


@pytest.mark.parametrize("page", ["README.md", "docs/launch.md"])
def test_folders_are_made_and_mounted_where_the_guide_starts_a_container(page):
    """Compose refuses a folder that is not there; the math recipe reads data and the hub's cache."""
    folders = [volume["source"].removeprefix("../") for volume in read("compose.yaml")["services"]["gpu"]["volumes"]]
    assert folders == ["runs", "data", "hf"]
    for block in re.findall(r"^```\n(.*?)^```", (ROOT / page).read_text(), flags=re.M | re.S):
        for command in ("docker compose", "docker run"):
            made, found, _ = block.partition(command)
            assert not found or "mkdir -p runs data hf" in made
        for line in block.replace("\\\n", " ").splitlines():
            if line.startswith("docker run") and "+recipe=math" in line:
                assert all(f'-v "$PWD/{folder}:/work/{folder}"' in line for folder in folders)
    prepared = "/opt/dpsrl/recipes/math/prepare_data.py"
    assert prepared in (ROOT / "docs/launch.md").read_text() and (ROOT / prepared[len("/opt/dpsrl/") :]).is_file()


def rayjob(arguments: str = "+recipe=math"):
    return read(
        "rayjob.yaml", DPSRL_ARGS=arguments, DPSRL_RUN_DIR="runs/math", DPSRL_NODES="2", DPSRL_GPUS="8",
        DPSRL_IMAGE="registry/dpsrl:gpu",
    )  # fmt: skip


def test_the_rayjob_has_what_kuberay_asks_for():
    job = rayjob()
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    spec = job["spec"]
    assert set(spec) <= {
        "entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec",
    }  # fmt: skip
    assert spec["entrypoint"].endswith(f"python {LAUNCH}") and spec["backoffLimit"] > 0
    cluster = spec["rayClusterSpec"]
    assert str(cluster["rayVersion"]) == version("ray") and cluster["authOptions"] == {"mode": "token"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == 2 and workers["groupName"]
    for group in (head, workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        (container,) = group["template"]["spec"]["containers"]
        assert container["image"] == "registry/dpsrl:gpu" and container["workingDir"] == "/work"
        assert group["template"]["spec"]["securityContext"]["runAsNonRoot"]
        named = {volume["name"] for volume in group["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == named
        env = {item["name"]: item.get("value") for item in container["env"]}
        assert (env["DPSRL_ADDRESS"], env["DPSRL_RUN_DIR"]) == ("auto", "runs/math")
    resources = workers["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"] == "8"


@pytest.mark.parametrize("arguments", ["+recipe=math 'data.instruction={problem}: \"think\"'", "a=1 b='#2'"])
def test_arguments_with_quotes_survive_the_manifest(arguments):
    (container,) = rayjob(arguments)["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "DPSRL_ARGS", "value": arguments} in container["env"]


def test_the_skypilot_task_restarts_what_is_unfinished_and_shares_a_token():
    task = read("sky.yaml")
    code = int(re.search(r"^UNFINISHED = (\d+)", (ROOT / "scripts" / "launch.py").read_text(), re.MULTILINE)[1])
    assert task["resources"]["job_recovery"] == {"recover_on_exit_codes": [code]}
    assert task["secrets"] == {"RAY_AUTH_TOKEN": None} and "scripts/launch.py" in task["run"]
    done = subprocess.run(["bash", "-n"], input=task["run"], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
