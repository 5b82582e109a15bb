// What the compiled code takes from glibc and libstdc++ that a Linux of 2018 (glibc 2.28, GCC 8) does not have, so that
// one library runs on it and on everything newer. It is linked into every library, and stays inside it.
#include <new>
#include <sstream>

// libstdc++'s headers rely on code in its shared library that older ones lack: with C++20, str(); with any, the default
// constructors. Here the compiler writes that code.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

// Read by libstdc++'s shared_ptr, which counts without atomics while it is true. glibc has it from 2.32 on.
extern "C" __attribute__((visibility("hidden"))) char __libc_single_threaded;
char __libc_single_threaded = 0;

// Called by std::vector's constructors where a size overflows. libstdc++ has it from GCC 11 on. exports.map keeps it inside.
namespace std {
[[noreturn]] void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std
