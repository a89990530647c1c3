"""Where do the kernels run without a GPU, and the builds without their compilers?"""
