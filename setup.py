"""Builds the wheel, and into it the CUDA library where torch and nvcc are at hand."""

import importlib.util
import os

from setuptools import find_packages, setup

SWITCH = "DECO_KERNELS_BUILD_CUDA"
ARCHS = ("7.5", "8.0", "8.6", "8.9", "9.0", "10.0", "12.0")


def machinery():
    """The module that builds at first use: loaded by its path, the package would want torch."""
    spec = importlib.util.spec_from_file_location("extension", "deco_kernels/host/library.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def default_archs(extension):
    """Those of ARCHS that this nvcc knows; later GPUs compile the last one's PTX."""
    known = extension.known_archs()
    return ";".join(arch for arch in ARCHS if int(arch.replace(".", "")) in known) + "+PTX"


def cuda_library():
    """setup()'s arguments for it; none if it is not wanted or cannot be built."""
    wanted = os.environ.get(SWITCH)
    if wanted not in (None, "0", "1"):
        raise SystemExit(f"{SWITCH} must be 0 or 1, or not set; got {wanted!r}")
    if wanted == "0":
        return {}
    try:
        extension = machinery()
        problem = extension.missing()
    except ImportError as error:
        problem = f"{error} (pip needs --no-build-isolation to see the torch that is installed)"
    if problem and wanted:
        raise SystemExit(f"{SWITCH}=1, but the CUDA library cannot be built: {problem}")
    if problem:
        print(f"the CUDA library is left to its first use: {problem}")
        return {}
    builder = extension.torch_builder()
    builder.CUDA_HOME = extension.cuda_home(extension.nvcc())
    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        os.environ["TORCH_CUDA_ARCH_LIST"] = default_archs(extension)
    library = builder.CUDAExtension(
        extension.AHEAD_OF_TIME,
        [f"csrc/{name}" for name in extension.SOURCES],
        extra_compile_args={
            **extension.FLAGS,
            "cxx": extension.FLAGS["cxx"] + extension.facts(os.environ["TORCH_CUDA_ARCH_LIST"]),
        },
    )
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": builder.BuildExtension},
        # For it does not see that TORCH_CUDA_ARCH_LIST or torch changed since the last build.
        "options": {"build_ext": {"force": True}},
    }


setup(packages=[*find_packages(include=["deco_kernels*"]), "deco_kernels.csrc"], **cuda_library())
