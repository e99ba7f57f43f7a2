#pragma once

// Checks for plain test programs: they count, print file, line and values, and go on after a
// failure. Unlike assert they stay in builds with NDEBUG. A program ends with `return
// fastmrc_test::report();`.

#include <cstdint>
#include <iostream>
#include <string>
#include <vector>

namespace fastmrc_test {

struct Counts {
  int64_t passed = 0;
  int64_t failed = 0;
};

inline Counts& counts() {
  static Counts counts;
  return counts;
}

// What was being tried when a check failed, such as the seed of a random case.
inline std::string& context() {
  static std::string context;
  return context;
}

template <typename T>
void print(const T& value) {
  std::cerr << value;
}

template <typename T>
void print(const std::vector<T>& values) {
  std::cerr << "[";
  for (const T& value : values) std::cerr << +value << " ";
  std::cerr << "]";
}

inline bool record(bool passed, const char* file, int line, const char* what) {
  if (passed) {
    ++counts().passed;
    return true;
  }
  ++counts().failed;
  std::cerr << file << ":" << line << ": failed: " << what;
  if (!context().empty()) std::cerr << " (" << context() << ")";
  std::cerr << "\n";
  return false;
}

template <typename A, typename B>
void check_eq(const A& a, const B& b, const char* file, int line, const char* what) {
  if (record(a == b, file, line, what)) return;
  std::cerr << "  left:  ";
  print(a);
  std::cerr << "\n  right: ";
  print(b);
  std::cerr << "\n";
}

template <typename Exception, typename Function>
void check_throws(Function function, const std::string& part, const char* file, int line,
                  const char* what) {
  std::string got = "nothing was thrown";
  try {
    function();
  } catch (const Exception& error) {
    got = error.what();
    if (got.find(part) != std::string::npos) {
      record(true, file, line, what);
      return;
    }
  } catch (const std::exception& error) {
    got = std::string("another exception: ") + error.what();
  }
  record(false, file, line, what);
  std::cerr << "  expected a message with \"" << part << "\"\n  got: " << got << "\n";
}

// The last line, and what main returns.
inline int report() {
  std::cout << counts().passed << " passed, " << counts().failed << " failed" << std::endl;
  return counts().failed == 0 && counts().passed > 0 ? 0 : 1;
}

}  // namespace fastmrc_test

#define CHECK(condition) \
  static_cast<void>(     \
      ::fastmrc_test::record(static_cast<bool>(condition), __FILE__, __LINE__, #condition))
#define CHECK_EQ(a, b) ::fastmrc_test::check_eq((a), (b), __FILE__, __LINE__, #a " == " #b)
// `statement` throws an `Exception` whose message contains `part`.
#define CHECK_THROWS(statement, Exception, part)                                                   \
  ::fastmrc_test::check_throws<Exception>([&] { static_cast<void>(statement); }, (part), __FILE__, \
                                          __LINE__, #statement)
