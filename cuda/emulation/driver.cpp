// A CUDA driver that runs nothing, for tests of what the host does: built as libcuda.so.1 and found ahead of the real one.
//
// It says that there is one GPU of compute capability 9.0, keeps the argument of the last launch of an optimizer's kernel, does what
// `optim_upload` would, counts what it is asked about memory, and calls managed what `driver_manage` names. Tensors on the CPU pass for
// the GPU's by way of `driver_exchange`, a torch exchange table (DLPack 1.3) that says so.
#include <cstdint>
#include <cstdlib>
#include <cstring>

extern "C" {

typedef int Result;
typedef uint64_t Address;

// What tests ask for.
static uint64_t request[2], questions, counts, fetches;
static size_t memory_left = size_t(1) << 37;
static Address managed_begin, managed_end;
uint64_t driver_request(int word) { return request[word]; }
uint64_t driver_questions() { return questions; }
uint64_t driver_counts() { return counts; }
uint64_t driver_fetches() { return fetches; }
void driver_leave(size_t bytes) { memory_left = bytes; }
void driver_manage(Address begin, Address end) { managed_begin = begin, managed_end = end; }

Result cuInit(unsigned) { return 0; }
Result cuDriverGetVersion(int* version) { return *version = 13000, 0; }
Result cuDeviceGetCount(int* count) { return *count = 1, 0; }
Result cuDeviceGet(int* device, int ordinal) { return *device = ordinal, 0; }
Result cuDeviceGetName(char* name, int size, int) { return strncpy(name, "none", size), 0; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: *value = 132; break;     // multiprocessors
        case 75: *value = 9; break;       // compute capability, major
        case 97: *value = 232448; break;  // bytes of shared memory that a block may ask for
        default: *value = 0;
    }
    return 0;
}
Result cuDevicePrimaryCtxRetain(void** context, int) { return *context = request, 0; }
Result cuDevicePrimaryCtxRelease_v2(int) { return 0; }
Result cuCtxGetCurrent(void** context) { return *context = request, 0; }
Result cuCtxSetCurrent(void*) { return 0; }
Result cuCtxPushCurrent_v2(void*) { return 0; }
Result cuCtxPopCurrent_v2(void**) { return 0; }
Result cuStreamGetCaptureInfo_v2(void*, int* status, uint64_t*, void*, void*, void*) { return *status = 0, 0; }
Result cuThreadExchangeStreamCaptureMode(int*) { return 0; }
Result cuMemGetInfo_v2(size_t* left, size_t* total) { return ++counts, *left = memory_left, *total = size_t(1) << 37, 0; }
Result cuMemPrefetchAsync(Address, size_t, int, void*) { return ++fetches, 0; }
Result cuGetErrorName(int, const char** name) { return *name = "none", 0; }
Result cuGetErrorString(int, const char** text) { return *text = "none", 0; }
Result cuGetProcAddress_v2(const char*, void** function, int, uint64_t, void*) { return *function = nullptr, 500; }

// A kernel is its name.
Result cuModuleLoadData(void** module, const void*) { return *module = request, 0; }
Result cuModuleGetFunction(void** function, void*, const char* name) { return *function = strdup(name), 0; }
Result cuFuncGetAttribute(int* value, int, void*) { return *value = 0, 0; }
Result cuFuncSetAttribute(void*, int, int) { return 0; }
Result cuOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void*, int, size_t) { return *blocks = 1, 0; }
Result cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, void*, int, size_t, unsigned) { return *blocks = 1, 0; }
Result cuLaunchKernel(void* kernel, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void** arguments, void**) {
    const char* const name = static_cast<const char*>(kernel);
    if (!strcmp(name, "optim_upload")) {
        void* const to = reinterpret_cast<void*>(*static_cast<Address*>(arguments[0]));
        memcpy(to, arguments[2], size_t(8) * *static_cast<uint32_t*>(arguments[1]));
    } else if (!strcmp(name, "optim_adam")) {
        memcpy(request, arguments[0], sizeof request);
    }
    return 0;
}

Result cuPointerGetAttributes(unsigned count, const int* names, void** values, Address address) {
    ++questions;
    const bool managed = address >= managed_begin && address < managed_end;
    for (unsigned i = 0; i < count; ++i) *static_cast<unsigned*>(values[i]) = names[i] == 2 ? 2 : names[i] == 8 ? managed : 0;
    return 0;
}

struct Tensor {
    void* data;
    int32_t device_kind, device_id, ndim;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *shape, *strides;
    uint64_t offset;
};
struct Exchange {
    uint32_t major, minor;
    void *previous, *allocate, *from_object, *to_object;
    int (*describe)(void* object, Tensor*);
    int (*stream)(int kind, int id, void** stream);
};
static Exchange real, passing;
Exchange* driver_exchange(const Exchange* table) {
    real = passing = *table;
    passing.describe = [](void* object, Tensor* tensor) {
        const int result = real.describe(object, tensor);
        if (result == 0 && tensor->device_kind == 1) tensor->device_kind = 2, tensor->device_id = 0;
        return result;
    };
    passing.stream = [](int, int, void** stream) { return *stream = nullptr, 0; };
    return &passing;
}

}  // extern "C"
