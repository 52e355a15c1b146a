#include "emulator/symbols.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <vector>

namespace pyvitfast::emulator {
namespace {

// dladdr knows exported symbols only; kernels with internal linkage are in the full symbol table.
std::string name_from_symbol_table(const char* file, std::uintptr_t offset) {
    std::ifstream stream(file, std::ios::binary);
    auto read = [&](void* to, std::size_t bytes, std::uint64_t at) {
        stream.seekg(static_cast<std::streamoff>(at));
        stream.read(static_cast<char*>(to), static_cast<std::streamsize>(bytes));
        return static_cast<bool>(stream);
    };
    Elf64_Ehdr header;
    if (!read(&header, sizeof(header), 0) || std::memcmp(header.e_ident, ELFMAG, SELFMAG) != 0) {
        return {};
    }
    std::vector<Elf64_Shdr> sections(header.e_shnum);
    if (!read(sections.data(), sections.size() * sizeof(Elf64_Shdr), header.e_shoff)) {
        return {};
    }
    for (const Elf64_Shdr& section : sections) {
        if (section.sh_type != SHT_SYMTAB) {
            continue;
        }
        std::vector<Elf64_Sym> symbols(section.sh_size / sizeof(Elf64_Sym));
        std::vector<char> strings(sections[section.sh_link].sh_size);
        if (!read(symbols.data(), section.sh_size, section.sh_offset) ||
            !read(strings.data(), strings.size(), sections[section.sh_link].sh_offset)) {
            return {};
        }
        for (const Elf64_Sym& symbol : symbols) {
            if (ELF64_ST_TYPE(symbol.st_info) == STT_FUNC && symbol.st_value == offset) {
                return strings.data() + symbol.st_name;
            }
        }
    }
    return {};
}

}  // namespace

std::string function_name(const void* function) {
    Dl_info info;
    if (dladdr(function, &info) == 0) {
        return {};
    }
    std::string name;
    if (info.dli_sname != nullptr && info.dli_saddr == function) {
        name = info.dli_sname;
    } else {
        const auto address = reinterpret_cast<std::uintptr_t>(function);
        const auto base = reinterpret_cast<std::uintptr_t>(info.dli_fbase);
        name = name_from_symbol_table(info.dli_fname, address - base);
        if (name.empty()) {  // an executable at a fixed address
            name = name_from_symbol_table(info.dli_fname, address);
        }
    }
    int status = 0;
    char* demangled = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    if (demangled == nullptr) {
        return name;
    }
    name = demangled;
    std::free(demangled);
    // Templates are demangled with their return type, "void name<4>(Params)".
    if (name.rfind("void ", 0) == 0) {
        name.erase(0, 5);
    }
    // The parameter list is the last bracketed group.
    int depth = 0;
    for (std::size_t i = name.size(); i-- > 0;) {
        depth += name[i] == ')' ? 1 : name[i] == '(' ? -1 : 0;
        if (depth == 0) {
            if (i > 0) {
                name.erase(i);
            }
            break;
        }
    }
    return name;
}

}  // namespace pyvitfast::emulator
