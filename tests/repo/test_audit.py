"""The audit of wheels, held to wheels that it has to refuse: for each check one that only this check objects to.

The wheels are made here, of the package's Python files and of tiny libraries: a C compiler and nvcc are needed.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import importlib.util
import itertools
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

import audit

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="torch-abi-audit needs Python 3.11 or newer")

ARCHS = ["9.0+PTX"]
SOURCES = ["a_cuda.cu", "b_cuda.cu"]
VERSION = "1.2.3"

METADATA = """\
Metadata-Version: 2.4
Name: fused_conv_bn
Version: {version}
Summary: A wheel to be audited
License-Expression: BSD-3-Clause
Requires-Python: >=3.10
Description-Content-Type: text/markdown
License-File: LICENSE
Requires-Dist: torch>=2.10
Provides-Extra: bench
Requires-Dist: tqdm; extra == "bench"

# A wheel to be audited
"""

WHEEL = """\
Wheel-Version: 1.0
Generator: test_audit
Root-Is-Purelib: false
Tag: {tag}
"""

# ---- the libraries ---------------------------------------------------------------------------------------------------

HOST = """\
unsigned long aoti_torch_abi_version(void);
__attribute__((constructor)) static void load(void) { aoti_torch_abi_version(); }
"""

# What nvcc makes of a source file: the fatbin, and a record that points to it.
FATBIN = """\
__asm__(".section .nv_fatbin, \\"a\\"\\n.balign 8\\nfatbin{n}: .incbin \\"{path}\\"\\n.previous");
extern const char fatbin{n}[] __attribute__((visibility("hidden")));
__attribute__((section(".nvFatBinSegment"), used))
static const struct {{ int magic, version; const void *data, *unused; }} record{n} = {{0x466243b1, 1, fatbin{n}, 0}};
"""

KERNELS = """\
namespace fused_conv_bn {
enum class Activation { kNone };
__device__ void add(VECTOR& value, VECTOR other) { value.x += other.y, value.y += other.x; }
__device__ void spill(VECTOR& value, VECTOR other) {
  volatile double memory[4] = {};
  memory[threadIdx.x % 4] = other.x;
  value.x = memory[threadIdx.y % 4];
}
#define KERNEL(name)                                                               \\
  template <Activation, bool kResidual>                                            \\
  __global__ void name(VECTOR* data, const VECTOR* residual) {                     \\
    VECTOR value = data[threadIdx.x];                                              \\
    if (kResidual) add(value, residual[threadIdx.x]);                              \\
    WORK(value, value);                                                            \\
    data[threadIdx.x] = value;                                                     \\
  }                                                                                \\
  template __global__ void name<Activation::kNone, false>(VECTOR*, const VECTOR*); \\
  template __global__ void name<Activation::kNone, true>(VECTOR*, const VECTOR*);
KERNEL(scale_shift_planes_kernel)
KERNEL(scale_shift_columns_kernel)
KERNEL(scale_shift_periodic_kernel)
}  // namespace fused_conv_bn
"""

NVCC = {
    "good": ["-DVECTOR=double2", "-DWORK=add", "-gencode=arch=compute_90,code=[sm_90,compute_90]"],
    "no PTX": ["-DVECTOR=double2", "-DWORK=add", "-gencode=arch=compute_90,code=sm_90"],
    "8 bytes": ["-DVECTOR=float2", "-DWORK=add", "-gencode=arch=compute_90,code=[sm_90,compute_90]"],
    "spill": ["-DVECTOR=double2", "-DWORK=spill", "-gencode=arch=compute_90,code=[sm_90,compute_90]"],
}


def find_nvcc() -> str:
    homes = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    spec = importlib.util.find_spec("nvidia")
    homes += [Path(location) / "cu13" for location in (spec.submodule_search_locations or [])] if spec else []
    found = [str(home / "bin" / "nvcc") for home in homes if (home / "bin" / "nvcc").exists()]
    nvcc = found[0] if found else shutil.which("nvcc")
    assert nvcc, "nvcc is missing: pip install 'cuda-toolkit[nvcc,cudart,cccl]==13.0.*'"
    return nvcc


def run(*command: str | Path) -> None:
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert result.returncode == 0, result.stdout


class Workshop:
    """Compiles, and keeps what it has compiled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.link = cache(self._link)
        self.fatbin = cache(self._fatbin)
        (directory / "kernels.cu").write_text(KERNELS)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(self.fatbin, *zip(*itertools.product(NVCC, SOURCES), strict=True)))

    def _fatbin(self, name: str, source: str) -> Path:
        """KERNELS compiled in a way of NVCC, and said to be of that source file."""
        path = self.directory / f"{name}_{source}.fatbin".replace(" ", "_")
        flags = [*NVCC[name], f"-Xfatbin=--ident={source}"] if source else NVCC[name]
        run(find_nvcc(), "--fatbin", *flags, "-o", path, self.directory / "kernels.cu")
        return path

    def stub(self, soname: str, code: str = "", *flags: str) -> Path:
        """A library to link against, for its name and its symbols."""
        path = self.directory / soname
        run(
            "cc", "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{soname}", "-o", path, *flags, self._file("stub.c", code)
        )
        return path

    def _file(self, name: str, text: str) -> Path:
        path = self.directory / name
        path.write_text(text)
        return path

    def _link(self, code: str, needs: tuple[str, ...], flags: tuple[str, ...], exported: bool) -> bytes:
        script = [] if exported else [f"-Wl,--version-script={audit.ROOT / 'csrc' / 'exports.map'}"]
        out = self.directory / "library.so"
        source = self._file("library.c", HOST + code)
        stubs = [self.stub(name) for name in needs]
        run("cc", "-shared", "-fPIC", "-O1", "-o", out, source, "-Wl,--no-as-needed", *stubs, *script, *flags)
        return out.read_bytes()


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("workshop"))


# ---- the wheels ------------------------------------------------------------------------------------------------------


class Draft:
    """What is about to become a wheel. Faultless at first; a test spoils it."""

    def __init__(self, workshop: Workshop, flavour: str) -> None:
        self.workshop = workshop
        self.matrix = copy.deepcopy(audit.read_matrix())
        self.matrix["kernels"] = []
        for library in self.matrix["libraries"].values():
            if "archs" in library:
                library["archs"] = ARCHS
        self.row = self.matrix["wheels"][flavour]
        self.version = f"{VERSION}+{self.row['local']}" if self.row["local"] else VERSION
        self.tag = self.matrix["tag"]
        self.dist_info = f"fused_conv_bn-{self.version}.dist-info"
        self.extra_members: list[str] = []
        self.spoil_record: Callable[[str], str] = str
        package = audit.ROOT / "src" / "fused_conv_bn"
        self.files = {str(path.relative_to(package.parent)): path.read_bytes() for path in package.rglob("*.py")}
        self.files[f"{self.dist_info}/METADATA"] = METADATA.format(version=self.version).encode()
        self.files[f"{self.dist_info}/WHEEL"] = WHEEL.format(tag=self.tag).encode()
        self.files[f"{self.dist_info}/entry_points.txt"] = b"[torch_dynamo_backends]\nfused_conv_bn = fused_conv_bn:f\n"
        self.files[f"{self.dist_info}/licenses/LICENSE"] = (audit.ROOT / "LICENSE").read_bytes()
        for name in self.row["libraries"]:
            self.library(name, fatbins=() if name == "cpu" else ("good", "good"))

    def library(
        self,
        name: str = "cpu",
        code: str = "",
        *,
        fatbins: tuple[str, ...] = (),
        sources: list[str] = SOURCES,
        needs: tuple[str, ...] = ("libtorch.so",),
        flags: tuple[str, ...] = (),
        exported: bool = False,
    ) -> None:
        code += f'__attribute__((used)) static const char name[] = "{name}";\n'  # else all were the same file
        for n, (fatbin, source) in enumerate(zip(fatbins, sources, strict=False)):
            code += FATBIN.format(n=n, path=self.workshop.fatbin(fatbin, source))
        self.files[f"fused_conv_bn/_{name}.so"] = self.workshop.link(code, needs, flags, exported)

    def replace(self, name: str, old: str, new: str) -> None:
        """In a file of the .dist-info directory."""
        path = f"{self.dist_info}/{name}"
        assert old.encode() in self.files[path]
        self.files[path] = self.files[path].replace(old.encode(), new.encode(), 1)

    def write(self, directory: Path) -> Path:
        record = ""
        for name, content in self.files.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(content)}\n"
        record += f"{self.dist_info}/RECORD,,\n"
        path = directory / f"fused_conv_bn-{self.version}-{self.tag}.whl"
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in self.files.items():
                archive.writestr(name, content)
            for name in self.extra_members:
                archive.writestr(name, self.files[name])
            archive.writestr(f"{self.dist_info}/RECORD", self.spoil_record(record))
        return path


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit.libraries, "cuda_sources", lambda: SOURCES)


def failures(path: Path, matrix: dict) -> dict[str, list[str]]:
    return {name: problems for name, problems in audit.audit(path, matrix) if problems}


@pytest.mark.parametrize("flavour", audit.read_matrix()["wheels"])
def test_faultless_wheel(flavour: str, workshop: Workshop, tmp_path: Path) -> None:
    draft = Draft(workshop, flavour)
    found = dict(audit.audit(draft.write(tmp_path), draft.matrix))
    assert found == {check.__name__.removeprefix("check_"): [] for check in audit.CHECKS}


def test_files_may_be_for_other_gpus(workshop: Workshop, tmp_path: Path) -> None:
    draft = Draft(workshop, "cu124")
    draft.matrix["kernels"] = [{"sources": ["b_*"], "cu12": ["9.0"]}]
    draft.library("cu12", fatbins=("good", "no PTX"))
    assert failures(draft.write(tmp_path), draft.matrix) == {}


# ---- wheels that must fail -------------------------------------------------------------------------------------------


@dataclass
class Case:
    check: str
    messages: tuple[str, ...]
    spoil: Callable[[Draft], None]
    flavour: str
    also: tuple[str, ...]
    """Checks that rightly object to the same thing."""


CASES: dict[str, Case] = {}


def case(check: str, *messages: str, flavour: str = "cpu", also: tuple[str, ...] = ()) -> Callable:
    """Registers a function that spoils a wheel. One wheel may be wrong in several ways, as each audit takes a second."""

    def register(spoil: Callable[[Draft], None]) -> None:
        CASES[spoil.__name__] = Case(check, messages, spoil, flavour, also)

    return register


def reference(symbol: str) -> str:
    return f"extern char {symbol}; __attribute__((used)) static char* use_{symbol} = &{symbol};\n"


@case("name", "tag is 'py3-none-linux_x86_64', expected 'py3-none-manylinux_2_28_x86_64'")
def platform_of_the_build_machine(draft: Draft) -> None:
    draft.tag = "py3-none-linux_x86_64"


@case(
    "name",
    "tag in WHEEL is 'cp312-cp312-manylinux_2_28_x86_64', expected 'py3-none-manylinux_2_28_x86_64'",
    "Root-Is-Purelib in WHEEL is 'true', expected 'false'",
    "version in METADATA is '1.2.4+cpu', expected '1.2.3+cpu'",
)
def metadata_of_another_wheel(draft: Draft) -> None:
    draft.replace("WHEEL", "py3-none", "cp312-cp312")
    draft.replace("WHEEL", "Purelib: false", "Purelib: true")
    draft.replace("METADATA", "1.2.3", "1.2.4")


@case("name", "local version is 'cpu', expected one of the matrix", also=("files", "size", "archs", "kernels"))
def flavour_that_is_not_built(draft: Draft) -> None:
    draft.row["local"] = "rocm"


@case(
    "files",
    "fused_conv_bn/scale_shift.cu does not belong into this wheel",
    "fused_conv_bn/_cu14.so does not belong into this wheel",
    "fused_conv_bn/ops.py is there twice",
)
def more_than_belongs_into_it(draft: Draft) -> None:
    draft.files["fused_conv_bn/scale_shift.cu"] = KERNELS.encode()
    draft.library("cu14")
    draft.extra_members = ["fused_conv_bn/ops.py"]


@case("files", "fused_conv_bn/__pycache__/ops.pyc does not", "tests/ops/test_ops.py does not", also=("contents",))
def what_builds_and_tests_leave(draft: Draft) -> None:
    draft.files["fused_conv_bn/__pycache__/ops.pyc"] = b"bytecode"
    draft.files["tests/ops/test_ops.py"] = b"assert True\n"


@case(
    "files",
    "fused_conv_bn/_loader.py is missing",
    "fused_conv_bn/_cu12.so is missing",
    "fused_conv_bn-1.2.3+cu124.dist-info/entry_points.txt is missing",
    flavour="cu124",
)
def less_than_belongs_into_it(draft: Draft) -> None:
    del draft.files[f"{draft.dist_info}/entry_points.txt"]
    del draft.files["fused_conv_bn/_loader.py"]
    del draft.files["fused_conv_bn/_cu12.so"]


@case(
    "record",
    "for fused_conv_bn/_cpu.so, expected ['sha256=",
    "RECORD has None for fused_conv_bn/ops.py",
    "RECORD lists fused_conv_bn/gone.py, which is not in the wheel",
)
def record_of_another_wheel(draft: Draft) -> None:
    def spoil(record: str) -> str:
        record = record.replace("fused_conv_bn/_cpu.so,sha256=", "fused_conv_bn/_cpu.so,sha256=0")
        return record.replace("fused_conv_bn/ops.py", "fused_conv_bn/gone.py")

    draft.spoil_record = spoil


@case(
    "requirements",
    "Requires-Dist is ['torch==2.14.1', 'numpy'], expected ['torch>=2.10']",
    "Requires-Python is '>=3.12', expected '>=3.10'",
)
def other_requirements(draft: Draft) -> None:
    draft.replace("METADATA", "torch>=2.10\n", "torch==2.14.1\nRequires-Dist: numpy\n")
    draft.replace("METADATA", ">=3.10", ">=3.12")


@case("license", "License-Expression is 'MIT', expected 'BSD-3-Clause'", "the LICENSE in the wheel differs")
def other_license(draft: Draft) -> None:
    draft.replace("METADATA", "BSD-3-Clause", "MIT")
    draft.replace("licenses/LICENSE", "Copyright", "Copywrong")


@case("twine", "long_description")
def no_description(draft: Draft) -> None:
    draft.replace("METADATA", "\n# A wheel to be audited\n", "")


@case("contents", "W002", flavour="fat")
def one_library_under_two_names(draft: Draft) -> None:
    draft.files["fused_conv_bn/_cu12.so"] = draft.files["fused_conv_bn/_cu13.so"]


@case("size", f"bytes, expected at most {audit.read_matrix()['wheels']['cpu']['max_bytes']}")
def too_large(draft: Draft) -> None:
    draft.files["fused_conv_bn/_cpu.so"] += os.urandom(draft.row["max_bytes"])


@case("needed", "_cpu.so needs libcudart.so.13, expected", "_cpu.so needs libtorch_cuda.so", also=("platform",))
def library_that_not_every_torch_brings(draft: Draft) -> None:
    draft.library(needs=("libtorch.so", "libtorch_cuda.so", "libcudart.so.13"))


@case("needed", "_cpu.so does not need libtorch.so", "_cpu.so searches '/opt/torch/lib' for libraries")
def torch_of_the_build_machine(draft: Draft) -> None:
    draft.library(needs=(), flags=("-Wl,-rpath,/opt/torch/lib",))


@case("exports", "_cpu.so exports leak, expected no exported symbol", "exports weak_leak", "exports unique_leak")
def exported_symbols(draft: Draft) -> None:
    # Every static member of a C++ template is a unique symbol: the dynamic linker makes all libraries share it.
    asm = (
        r".data\n.globl unique_leak\n.type unique_leak, @gnu_unique_object\n.size unique_leak, 1\nunique_leak: .byte 0"
    )
    code = f'void leak(void) {{}}\n__attribute__((weak)) void weak_leak(void) {{}}\n__asm__("{asm}\\n.previous");\n'
    draft.library(code=code, exported=True)


@case(
    "undefined",
    "_cpu.so refers to _ZNK2at6Tensor3sumEv, which is neither",
    "_cpu.so refers to _ZTIN3c105ErrorE, which is neither",
    also=("torch_abi",),
)
def cxx_of_torch(draft: Draft) -> None:
    draft.library(code=reference("_ZNK2at6Tensor3sumEv") + reference("_ZTIN3c105ErrorE"))


@case("undefined", "_cpu.so refers to PyErr_Clear, which is neither", "_cpu.so refers to cudaMalloc, which is neither")
def symbols_of_nobody(draft: Draft) -> None:
    draft.library(code=reference("PyErr_Clear") + reference("cudaMalloc"))


@case(
    "torch_abi",
    "_cpu.so uses torch_from_blob of torch 2.11.0, expected 2.10 or older",
    "_cpu.so uses what no known torch has: aoti_torch_from_the_future",
)
def newer_torch(draft: Draft) -> None:
    draft.library(code=reference("torch_from_blob") + reference("aoti_torch_from_the_future"))


@case(
    "platform",
    "auditwheel: the symbols are those of manylinux_2_34_x86_64, expected manylinux_2_28_x86_64 (",
    "libm.so.6: GLIBC_2.34",
)
def newer_glibc(draft: Draft) -> None:
    versions = draft.workshop.directory / "versions.map"
    versions.write_text("GLIBC_2.34 { global: new_in_glibc; };")
    libm = draft.workshop.stub("libm.so.6", "void new_in_glibc(void) {}", f"-Wl,--version-script={versions}")
    draft.library(code=reference("new_in_glibc"), flags=(str(libm),))


@case(
    "archs",
    "_cu12.so: a_cuda.cu: PTX for sm_90 is there 0 times, expected 1",
    "_cu12.so: b_cuda.cu: PTX for sm_90 is there 0 times, expected 1",
    "_cu13.so: b_cuda.cu: PTX for sm_90 is there 0 times, expected 1",
    flavour="fat",
)
def no_ptx(draft: Draft) -> None:
    draft.library("cu12", fatbins=("no PTX", "no PTX"))
    draft.library("cu13", fatbins=("good", "no PTX"))


@case(
    "archs",
    "_cu12.so: a_cuda.cu: machine code for sm_80 is there 0 times, expected 1",
    "_cu12.so: a_cuda.cu: machine code for sm_90 is there 1 times, expected 0",
    flavour="cu124",
)
def other_archs(draft: Draft) -> None:
    draft.matrix["libraries"]["cu12"]["archs"] = ["8.0"]


@case("archs", "_cu12.so: b_cuda.cu: PTX for sm_90 is there 1 times, expected 0", flavour="cu124")
def archs_of_another_file(draft: Draft) -> None:
    draft.matrix["kernels"] = [{"sources": ["b_*"], "cu12": ["9.0"]}]
    draft.library("cu12", fatbins=("no PTX", "good"))


@case(
    "archs",
    "_cu12.so: b_cuda.cu: machine code for sm_90 is there 0 times, expected 1",
    "_cu12.so: no source file: machine code for sm_90 is there 1 times, expected 0",
    "_cu13.so: a_cuda.cu: machine code for sm_90 is there 2 times, expected 1",
    flavour="fat",
)
def code_of_an_unknown_file(draft: Draft) -> None:
    draft.library("cu12", fatbins=("good", "good"), sources=["a_cuda.cu", ""])
    draft.library("cu13", fatbins=("good", "good"), sources=["a_cuda.cu", "a_cuda.cu"])


@case("archs", "_cpu.so has GPU code, and the matrix has no architecture for it")
def gpu_code_in_the_cpu_library(draft: Draft) -> None:
    draft.library(fatbins=("good",))


@case("archs", "_cu13.so has no GPU code", flavour="cu130", also=("kernels",))
def no_gpu_code(draft: Draft) -> None:
    draft.library("cu13")


@case(
    "kernels",
    "_cu13.so: sm_90: _ZN13fused_conv_bn26scale_shift_columns_kernel",
    "has 0 LDG.128, expected 1",
    "uses local memory: STL",
    "has a stack: REG:",
    flavour="fat",
)
def narrow_and_spilling_kernels(draft: Draft) -> None:
    draft.library("cu12", fatbins=("spill", "good"))
    draft.library("cu13", fatbins=("good", "8 bytes"))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_wheel_must_fail(name: str, workshop: Workshop, tmp_path: Path) -> None:
    case = CASES[name]
    draft = Draft(workshop, case.flavour)
    case.spoil(draft)
    found = failures(draft.write(tmp_path), draft.matrix)
    for message in case.messages:
        assert any(message in problem for problem in found.get(case.check, [])), (message, found)
    assert found.keys() == {case.check, *case.also}


def test_each_check_has_a_wheel_that_must_fail() -> None:
    assert {case.check for case in CASES.values()} == {check.__name__.removeprefix("check_") for check in audit.CHECKS}


def test_missing_tools_are_failures(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draft = Draft(workshop, "cpu")
    path = draft.write(tmp_path)
    monkeypatch.setitem(sys.modules, "torch_abi_audit", None)
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    found = failures(path, draft.matrix)
    assert found.keys() == {"twine", "contents", "torch_abi", "platform"}
    assert found["torch_abi"] == ["torch-abi-audit is missing: pip install torch-abi-audit, with Python 3.11 or newer"]


# ---- the program -----------------------------------------------------------------------------------------------------


def test_program_reports_all_wheels(
    workshop: Workshop, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = Draft(workshop, "cpu")
    monkeypatch.setattr(audit, "read_matrix", lambda: draft.matrix)
    good = draft.write(tmp_path)
    assert audit.main([str(good)]) == 0
    assert "FAILED" not in capsys.readouterr().out

    draft = Draft(workshop, "fat")
    draft.files["fused_conv_bn/_cu12.so"] = b"\x7fELF, and then nothing"
    (tmp_path / "no.whl").write_bytes(b"no zip file")
    assert audit.main([str(tmp_path / "no.whl"), str(draft.write(tmp_path)), str(good)]) == 1
    out = capsys.readouterr().out
    assert "no.whl cannot be read: File is not a zip file" in out
    assert "needed: could not be checked: ValueError: _cu12.so is damaged" in out
    assert out.count("  ok      twine") == 2
