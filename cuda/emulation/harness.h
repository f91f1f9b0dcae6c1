// What the programs of a machine share: a kernel, settings by name, memory that nobody may leave, random numbers. -DKERNEL_SOURCE names
// the kernel's source.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "machine.h"
#include KERNEL_SOURCE

namespace {

constexpr bool IS_F16 = std::is_same_v<ELEMENT, F16>;

struct Settings {
    std::map<std::string, std::string> given;
    Settings(int count, char** arguments) {
        for (int i = 1; i < count; ++i) {
            const std::string argument = arguments[i];
            given[argument.substr(0, argument.find('='))] = argument.substr(argument.find('=') + 1);
        }
    }
    u32 get(const char* name, u32 otherwise) const {
        const auto found = given.find(name);
        return found == given.end() ? otherwise : u32(std::stoul(found->second));
    }
    std::vector<u32> list(const char* name) const {
        std::vector<u32> values;
        const std::string& text = given.at(name);
        for (size_t at = 0; at < text.size(); at = text.find(',', at) == std::string::npos ? text.size() : text.find(',', at) + 1)
            values.push_back(u32(std::stoul(text.substr(at))));
        return values;
    }
};

// Memory that ends where a page begins that nobody may touch.
template <class T> T* guarded(size_t count) {
    const size_t bytes = count * sizeof(T), pages = (bytes + 4095) / 4096 * 4096;
    u8* const memory = static_cast<u8*>(mmap(nullptr, pages + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (memory == MAP_FAILED || mprotect(memory + pages, 4096, PROT_NONE) != 0) machine::fail("no memory");
    return reinterpret_cast<T*>(memory + pages - bytes);
}

std::mt19937 generator;
float normal() { return std::normal_distribution<float>()(generator); }
ELEMENT element_of(float v) { return from_float<ELEMENT>(v); }

}  // namespace
