"""Builds the compiled libraries: pera_fast/_C.so (CPU) and, where nvcc is, pera_fast/_C_cuda.so.

Both are plain shared libraries against libtorch's stable ABI: one build serves every torch >= 2.10 and every
Python. They register ops when loaded with torch.ops.load_library (pera_fast/ops/_library.py).

Environment:
    CXX                      C++ compiler (default: c++, g++ or clang++ on PATH)
    CUDA_HOME                CUDA toolkit (or CUDA_PATH; default: the one nvcc on PATH belongs to, else /usr/local/cuda)
    TORCH_CUDA_ARCH_LIST     e.g. "8.0;9.0+PTX" (default: the visible GPUs, else 8.0;9.0+PTX)
    PERA_FAST_BUILD_CUDA     0 leaves the CUDA library out
    PERA_FAST_REQUIRE_CUDA   1 turns a CUDA library that cannot be built from a warning into an error
    MAX_JOBS                 parallel compilations (default: the CPUs this process may use)
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_namespace_packages, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
TORCH_TARGET_VERSION = "0x020a000000000000"  # stable ABI of torch 2.10, the oldest supported
DEFAULT_ARCHS = "8.0;9.0+PTX"


class BuildError(ExecError):
    """A library cannot be built; the message is one sentence that says why."""


def output_of(*command: str) -> str:
    """Standard output and error of a command, or "" when it cannot run."""
    try:
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, timeout=120
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def find_torch() -> tuple[Path, str]:
    """Directory and version of torch, without importing it: its headers are all that is used."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("The build needs torch >= 2.10 in the environment it runs in; none is installed.")
    root = Path(next(iter(spec.submodule_search_locations)))
    version = str(runpy.run_path(str(root / "version.py"))["__version__"])
    if not (root / "include/torch/csrc/stable/library.h").is_file():
        raise BuildError(f"The build needs torch >= 2.10 with its headers; found torch {version}.")
    return root, version


def find_compiler() -> str:
    """The C++ compiler: CXX, else the first of c++, g++, clang++ on PATH."""
    asked = os.environ.get("CXX")
    for name in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(name)[0]):
            return name
    missing = f"CXX={asked} is not" if asked else "neither c++ nor g++ nor clang++ is"
    raise BuildError(
        f"The build needs a C++17 compiler, but {missing} on PATH: install one "
        "(for example `apt-get install g++`) or set CXX."
    )


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH, else of the toolkit's customary place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # A home may hold the libraries alone, as that of a package environment does.
    own = shutil.which("nvcc", path=Path(home) / "bin") if home else None
    return own or shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def program_of(compiler: str) -> str:
    """Of CXX's words the compiler itself, which nvcc's -ccbin takes, without a cache before it and options."""
    words = shlex.split(compiler)
    return next((word for word in words if Path(word).name not in ("ccache", "sccache", "distcc")), words[0])


def toolkit_of(nvcc: str) -> str | None:
    """Root of the toolkit that `nvcc` runs. The file on PATH may be a link or a wrapper, so nvcc is asked."""
    match = re.search(r"^#\$ TOP=(.*)$", output_of(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    return os.path.realpath(match.group(1).strip()) if match else None


def cuda_archs(nvcc: str) -> list[str]:
    """What to compile for, as entries "80", "90a" (machine code) and "90+PTX" (machine code and PTX)."""
    supported = re.findall(r"compute_(\d+)\b", output_of(nvcc, "--list-gpu-arch"))
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not asked:
        # nvidia-smi rather than torch: the torch of this environment may be a CPU build.
        visible = output_of("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
        found = sorted(set(re.findall(r"^\d+\.\d+$", visible, re.MULTILINE)), key=lambda arch: float(arch))
        if found and all(arch.replace(".", "") in supported for arch in found):
            asked = ";".join(found) + "+PTX"
        else:  # none, or one that this nvcc does not know: PTX serves newer ones
            asked = DEFAULT_ARCHS
    archs = []
    for entry in re.split(r"[;,\s]+", asked.strip()):
        match = re.fullmatch(r"(\d+)\.?(\d[af]?)(\+PTX)?", entry)
        if not match:
            raise BuildError(f'TORCH_CUDA_ARCH_LIST: expected numbers such as "8.0;9.0+PTX", got {entry!r}.')
        archs.append(match.group(1) + match.group(2) + (match.group(3) or ""))
    return archs


def gencode(archs: list[str]) -> list[str]:
    """nvcc's options for `archs`."""
    flags = []
    for arch in archs:
        number = arch.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def is_fresh(target: Path, dependencies: Path, command: list[str]) -> bool:
    """Whether `target` was made by this very command from files that have not changed since."""
    recorded = target.with_name(target.name + ".command")
    if not (target.is_file() and dependencies.is_file() and recorded.is_file()):
        return False
    if recorded.read_text() != shlex.join(command):
        return False
    made = target.stat().st_mtime
    text = dependencies.read_text().replace("\\\n", " ").partition(":")[2]
    files = re.findall(r"(?:\\ |\S)+", text)
    try:
        return all(Path(file.replace("\\ ", " ")).stat().st_mtime <= made for file in files)
    except OSError:
        return False


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    if done.stdout.strip():
        print(done.stdout, flush=True)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no output")
        raise BuildError(f"{Path(command[0]).name} failed: {first.strip()}")


def compile_all(jobs: list[tuple[list[str], Path, Path]]) -> None:
    """Run the compile commands (command, object, dependency file) in parallel; skip what is up to date."""

    def compile_one(job: tuple[list[str], Path, Path]) -> None:
        command, target, dependencies = job
        if is_fresh(target, dependencies, command):
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        run(command)
        target.with_name(target.name + ".command").write_text(shlex.join(command))

    workers = int(os.environ.get("MAX_JOBS") or 0) or len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(compile_one, jobs))


def replace_file(source: Path, destination: Path) -> None:
    """Copy to `destination` in one step: a process that has the old library mapped keeps the old file."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}")
    shutil.copyfile(source, temporary)
    os.replace(temporary, destination)


class BuildLibraries(build_ext):
    """build_ext for the two libraries, and for _build_info.json, which tells how they were built."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"  # no Python ABI in it, so none in the name

    def build_extensions(self) -> None:
        torch_root, torch_version = find_torch()
        compiler = find_compiler()
        includes = [f"-isystem{torch_root / 'include'}"]
        self.common = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}", *includes]
        # --no-as-needed: nothing refers to libtorch itself, but it is what leads the loader to libtorch_cuda.
        self.torch_libraries = [f"-L{torch_root / 'lib'}", "-ltorch", "-ltorch_cpu"]
        self.info: dict[str, object] = {
            "torch": torch_version,
            "torch_target_version": "2.10",
            "compiler": compiler,
            "compiler_version": (output_of(*shlex.split(compiler), "--version").splitlines() or ["?"])[0],
            "cpu_flags": self.cpu_flags(),
        }
        cpu, cuda = self.extensions
        self.build_cpu(cpu, compiler)
        try:
            self.info["cuda"] = self.build_cuda(cuda, compiler)
        except BuildError as error:
            if os.environ.get("PERA_FAST_REQUIRE_CUDA", "0") not in ("", "0"):
                raise
            self.info["cuda"] = {"missing": str(error)}
            stale = Path(self.get_ext_fullpath(cuda.name))
            stale.unlink(missing_ok=True)
            # Not having nvcc is an ordinary place to be; a failure of one that is there deserves attention.
            if find_nvcc():
                warnings.warn(f"pera_fast is built without its CUDA library: {error}", stacklevel=1)
            print(f"pera_fast is built without its CUDA library: {error}", file=sys.stderr, flush=True)
        info_file = Path(self.build_lib) / "pera_fast/_build_info.json"
        info_file.parent.mkdir(parents=True, exist_ok=True)
        info_file.write_text(json.dumps(self.info, indent=2) + "\n")

    def cpu_flags(self) -> list[str]:
        # No -march: the library must run wherever its wheel does. Hot loops choose their ISA at run time.
        # -fno-math-errno and -fno-trapping-math only free the vectoriser from errno and from floating-point traps;
        # -ffp-contract=off keeps a product and a sum two roundings but where a kernel asks for one, so that every ISA
        # gives the same bits where that is promised.
        return [
            "-std=c++17",
            "-O3",
            "-fPIC",
            "-fopenmp-simd",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
        ]

    def objects(
        self, sources: list[str], command: list[str], kind: str
    ) -> tuple[list[tuple[list[str], Path, Path]], list[str]]:
        jobs, names = [], []
        for source in sources:
            target = Path(self.build_temp).resolve() / kind / (source + ".o")
            dependencies = target.with_suffix(".d")
            names.append(str(target))
            made = ["-MMD", "-MF", str(dependencies), "-c", source, "-o", str(target)]
            jobs.append(([*command, *made], target, dependencies))
        return jobs, names

    def build_cpu(self, extension: Extension, compiler: str) -> None:
        command = [*shlex.split(compiler), *self.cpu_flags(), *self.common]
        jobs, names = self.objects(extension.sources, command, "cpu")
        compile_all(jobs)
        self.link(extension, [*shlex.split(compiler), "-shared", *names, *self.torch_libraries])

    def build_cuda(self, extension: Extension, compiler: str) -> dict[str, object]:
        if os.environ.get("PERA_FAST_BUILD_CUDA", "1") == "0":
            raise BuildError("PERA_FAST_BUILD_CUDA=0 left it out.")
        nvcc = find_nvcc()
        if nvcc is None:
            raise BuildError("nvcc was not found (CUDA_HOME, PATH).")
        archs = cuda_archs(nvcc)
        flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler=-fPIC,-Wall", *gencode(archs)]
        sources = [source for source in extension.sources if source.endswith(".cu")]
        jobs, names = self.objects(sources, [nvcc, "-ccbin", program_of(compiler), *flags], "cuda")
        bindings = [source for source in extension.sources if source.endswith(".cpp")]
        more, more_names = self.objects(
            bindings, [*shlex.split(compiler), *self.cpu_flags(), *self.common], "cuda"
        )
        compile_all(jobs + more)
        # The static runtime: torch brings its own shared one, perhaps of another minor version.
        libraries = ["-cudart=static", *self.torch_libraries]
        self.link(extension, [nvcc, "-ccbin", program_of(compiler), "-shared", *names, *more_names,
                              *libraries], through="-Xlinker=")  # fmt: skip
        version = re.search(r"release [\d.]+, V([\d.]+)", output_of(nvcc, "--version"))
        return {
            "nvcc": nvcc,
            "toolkit": toolkit_of(nvcc),
            "nvcc_version": version.group(1) if version else None,
            "archs": archs,
            "flags": flags,
        }

    def link(self, extension: Extension, command: list[str], through: str = "-Wl,") -> None:
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{os.getpid()}").resolve()
        position = command.index("-ltorch")
        command = [*command[:position], f"{through}--no-as-needed", *command[position:], "-o", str(temporary)]
        try:
            run(command)
            os.replace(temporary, target)
        finally:
            temporary.unlink(missing_ok=True)

    def copy_extensions_to_source(self) -> None:
        """After an editable build: put the results beside the Python files, and remove what is stale."""
        for name in [*(self.get_ext_filename(e.name) for e in self.extensions), "pera_fast/_build_info.json"]:
            built, destination = Path(self.build_lib) / name, ROOT / name
            if built.is_file():
                replace_file(built, destination)
            else:
                destination.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        names = [*(self.get_ext_filename(e.name) for e in self.extensions), "pera_fast/_build_info.json"]
        return [str(Path(self.build_lib) / name) for name in names if (Path(self.build_lib) / name).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        if not self.inplace:
            return {}
        return {output: str(ROOT / Path(output).relative_to(self.build_lib)) for output in self.get_outputs()}


class PlatformWheel(bdist_wheel):
    """py3-none-<platform>: the libraries depend on the machine, not on the Python that loads them."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


def files(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


# Headers, and files that only the source distribution needs.
headers = files("csrc/**/*.h", "csrc/build_backend.py", "constraints.txt")

setup(
    packages=[
        # Namespace packages too: pera_fast/demo holds data alone.
        *find_namespace_packages(include=["pera_fast", "pera_fast.*"], exclude=["*.__pycache__"]),
        "pera_fast.kernels",
        *(f"pera_fast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"pera_fast.kernels": "kernels"},
    ext_modules=[
        Extension("pera_fast._C", files("csrc/*.cpp", "csrc/cpu/*.cpp"), depends=headers),
        Extension(
            "pera_fast._C_cuda", files("csrc/cuda/*.cu", "csrc/cuda/*.cpp"), depends=headers, optional=True
        ),
    ],
    cmdclass={"build_ext": BuildLibraries, "bdist_wheel": PlatformWheel},
    zip_safe=False,
)
