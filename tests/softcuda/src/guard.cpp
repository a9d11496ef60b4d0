// Runs a kernel so that a memory access of its that leads nowhere ends the kernel, as on a device, and not the process.

#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>

extern "C" __attribute__((visibility("hidden"))) int kv_shim_run(
    size_t entry, const void* params, const uint32_t grid[3], const uint32_t block[3], size_t shared_bytes);

// What kv_guard_run returns for such an access; the shim's own codes are smaller.
static const int FAULT = 1000;

// Volatile, for the handler reads them between any two instructions.
static __thread volatile bool armed;
static __thread sigjmp_buf before;
static __thread void* volatile where;

static struct sigaction former_segv, former_bus;
static pthread_once_t installed = PTHREAD_ONCE_INIT;

// The jump leads from a fiber's stack to the thread's; what the fibers hold is left, for the context has ended.
static void on_fault(int signal, siginfo_t* info, void*) {
    if (armed) {
        armed = false;
        where = info->si_addr;
        siglongjmp(before, 1);
    }
    // Not a kernel's: whoever was responsible before gets it, as the access is tried again.
    sigaction(signal, signal == SIGSEGV ? &former_segv : &former_bus, nullptr);
}

static void install() {
    struct sigaction action = {};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK;
    sigaction(SIGSEGV, &action, &former_segv);
    sigaction(SIGBUS, &action, &former_bus);
}

// As kv_shim_run; FAULT, with the address in `*address`, for an access that leads nowhere.
extern "C" __attribute__((visibility("hidden"))) int kv_guard_run(
    size_t entry, const void* params, const uint32_t grid[3], const uint32_t block[3], size_t shared_bytes,
    uint64_t* address) {
    pthread_once(&installed, install);
    if (sigsetjmp(before, 1) != 0) {
        *address = (uint64_t)where;
        return FAULT;
    }
    armed = true;
    int result = kv_shim_run(entry, params, grid, block, shared_bytes);
    armed = false;
    return result;
}
