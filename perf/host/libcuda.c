/* A stand-in for NVIDIA's driver library: every call succeeds, and no kernel runs. Triton's own code compiles kernels
   and launches them through it, so that the host's time is that of a machine with a GPU. */

#include <stddef.h>
#include <stdint.h>

#define DOES_NOTHING(name) \
  int name(void) { return 0; }

DOES_NOTHING(cuInit)
DOES_NOTHING(cuFuncSetAttribute)
DOES_NOTHING(cuFuncSetCacheConfig)
DOES_NOTHING(cuCtxSetCurrent)
DOES_NOTHING(cuCtxSetLimit)
DOES_NOTHING(cuModuleUnload)
DOES_NOTHING(cuTensorMapEncodeTiled)
DOES_NOTHING(cuTensorMapEncodeIm2col)
DOES_NOTHING(cuOccupancyMaxActiveClusters)

static long launches = 0;
int cuLaunchKernelEx(void) { launches++; return 0; }
long launch_count(void) { return launches; }

static int any_object;
int cuModuleLoadData(void **module, const void *image) { *module = &any_object; return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = &any_object; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &any_object; return 0; }
int cuCtxGetCurrent(void **context) { *context = &any_object; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 << 10; return 0; }
int cuPointerGetAttribute(void *value, int attribute, uint64_t address) { *(uint64_t *)value = address; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the stand-in"; return 0; }

/* Attribute 0 is the most threads of a block; the others are registers and bytes, which Triton only reports. */
int cuFuncGetAttribute(int *value, int attribute, void *function) { *value = attribute == 0 ? 1024 : 0; return 0; }
