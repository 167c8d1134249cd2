from tests.lib.host_cuda import build

print(build())
