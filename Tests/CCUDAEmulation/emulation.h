// What the emulated card offers to the emulated libraries.
#pragma once
#include <cstddef>
#include <functional>

namespace emulation {
// Whether the calling thread is in a context.
bool in_context();
// Whether that is one piece of device memory.
bool on_card(const void *address, size_t bytes);
// Queues work that touches device memory, and counts it; false where the context is lost.
bool enqueue(const char *name, std::function<void()> work);
}  // namespace emulation
