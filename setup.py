"""Builds the wheel, and into it the CUDA library where torch and nvcc are at hand."""

import importlib.util
import os

from setuptools import find_packages, setup

SWITCH = "DECO_KERNELS_BUILD_CUDA"
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def toolchain_module():
    """What also builds at first use: loaded by its path, for the package itself wants torch."""
    spec = importlib.util.spec_from_file_location("toolchain", "deco_kernels/host/toolchain.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def default_archs(toolchain):
    """Those of ARCHS that this nvcc knows; later GPUs compile the last one's PTX."""
    known = toolchain.known_archs()
    return ";".join(arch for arch in ARCHS if int(arch.replace(".", "")) in known) + "+PTX"


def cuda_library():
    """setup()'s arguments for it; none if it is not wanted or cannot be built."""
    wanted = os.environ.get(SWITCH)
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"{SWITCH} must be 0 or 1, or not set; got {wanted!r}")
    if wanted == "0":
        return {}
    try:
        toolchain = toolchain_module()
        problem = toolchain.missing()
    except ImportError as error:
        problem = f"{error} (pip needs --no-build-isolation to see the torch that is installed)"
    if problem and wanted:
        raise SystemExit(f"{SWITCH}=1, but the CUDA library cannot be built: {problem}")
    if problem:
        print(f"the CUDA library is left to its first use: {problem}")
        return {}
    builder = toolchain.torch_builder()
    builder.CUDA_HOME = toolchain.cuda_home(toolchain.nvcc())
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(toolchain)
    library = builder.CUDAExtension(
        toolchain.AHEAD_OF_TIME,
        [f"csrc/{name}" for name in toolchain.SOURCES],
        extra_compile_args={
            **toolchain.FLAGS,
            "cxx": toolchain.FLAGS["cxx"] + toolchain.facts(os.environ["TORCH_CUDA_ARCH_LIST"]),
        },
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": builder.BuildExtension},
        # For it does not see that TORCH_CUDA_ARCH_LIST or torch changed since the last build.
        "options": {"build_ext": {"force": True}},
    }


setup(packages=[*find_packages(include=["deco_kernels*"]), "deco_kernels.csrc"], **cuda_library())
