// Switching between stacks, without a system call.
#pragma once

// Saves the running stack's registers on it and its pointer in `*save`, and goes on where `load` was saved.
extern "C" void kv_switch(void** save, void* load);

// What a new stack must hold so that kv_switch to the result calls `main`, which never returns.
void* kv_new_stack(unsigned char* stack, unsigned long bytes, void (*main)());
