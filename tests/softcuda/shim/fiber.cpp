#include "fiber.h"

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)

// The System V ABI keeps these six registers and the stack pointer across a call.
asm(R"(
    .text
    .globl kv_switch
    .hidden kv_switch
    .type kv_switch, @function
kv_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size kv_switch, .-kv_switch
)");

void* kv_new_stack(unsigned char* stack, unsigned long bytes, void (*main)()) {
    uint64_t* top = (uint64_t*)((uintptr_t)(stack + bytes) & ~(uintptr_t)15);
    // A function begins 8 bytes off a multiple of 16, with its return address on top: there is none.
    *--top = 0;
    *--top = (uint64_t)main;
    top -= 6;
    memset(top, 0, 6 * 8);
    return top;
}

#elif defined(__aarch64__)

// The procedure call standard keeps x19 to x30, d8 to d15 and the stack pointer across a call.
asm(R"(
    .text
    .globl kv_switch
    .hidden kv_switch
    .type kv_switch, @function
kv_switch:
    sub sp, sp, #160
    stp x19, x20, [sp, #0]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp, #0]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size kv_switch, .-kv_switch
)");

void* kv_new_stack(unsigned char* stack, unsigned long bytes, void (*main)()) {
    uint64_t* top = (uint64_t*)((uintptr_t)(stack + bytes) & ~(uintptr_t)15);
    top -= 20;
    memset(top, 0, 160);
    // x30, where `ret` goes.
    top[11] = (uint64_t)main;
    return top;
}

#else
#error "fibers are written for x86-64 and AArch64"
#endif
