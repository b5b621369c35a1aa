# Written by setup.py: how this copy was built.
torch_version: str
cuda_version: str | None
cuda_architectures: str
no_cuda_reason: str
