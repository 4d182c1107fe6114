// JSON (RFC 8259) as a tree, for the configuration inside a model's file.
#pragma once
#include <cmath>
#include <cstdio>
#include <locale>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace far_json {

struct Value {
  enum Kind { NONE, BOOLEAN, NUMBER, TEXT, LIST, OBJECT } kind = NONE;
  double number = 0;  // 0 or 1 of a boolean
  std::string text;
  std::vector<Value> list;
  std::map<std::string, Value> object;

  // A member of an object; nothing where it has none.
  const Value& operator[](const std::string& key) const {
    static const Value nothing;
    const auto found = object.find(key);
    return found == object.end() ? nothing : found->second;
  }
};

class Reader {
 public:
  explicit Reader(const std::string& text) : at(text.c_str()), end(at + text.size()) {}

  // Throws std::runtime_error where the text is no JSON.
  Value read() {
    Value value = any(0);
    space();
    if (at != end) fail();
    return value;
  }

 private:
  const char *at, *const end;
  static constexpr int DEEPEST = 32;

  [[noreturn]] static void fail() { throw std::runtime_error("its configuration is no JSON"); }
  void space() {
    while (at != end && (*at == ' ' || *at == '\t' || *at == '\n' || *at == '\r')) ++at;
  }
  bool take(const std::string& word) {
    if (size_t(end - at) < word.size() || word.compare(0, word.size(), at, word.size())) return false;
    at += word.size();
    return true;
  }
  bool next(char c) {
    space();
    return take(std::string(1, c));
  }

  Value any(int depth) {
    if (depth > DEEPEST) fail();
    Value value;
    if (next('{')) {
      value.kind = Value::OBJECT;
      if (next('}')) return value;
      do {
        space();
        const std::string key = string();
        if (!next(':')) fail();
        value.object[key] = any(depth + 1);
      } while (next(','));
      if (!next('}')) fail();
    } else if (next('[')) {
      value.kind = Value::LIST;
      if (next(']')) return value;
      do value.list.push_back(any(depth + 1));
      while (next(','));
      if (!next(']')) fail();
    } else if (at != end && *at == '"') {
      value.kind = Value::TEXT;
      value.text = string();
    } else if (take("true") || take("false")) {
      value.kind = Value::BOOLEAN;
      value.number = at[-2] == 'u';  // of "true"
    } else if (!take("null")) {
      value.kind = Value::NUMBER;
      value.number = number();
    }
    return value;
  }

  // In the C locale, whatever the program's is.
  double number() {
    if (take("NaN")) return NAN;  // as Python writes them
    if (take("-Infinity")) return -INFINITY;
    if (take("Infinity")) return INFINITY;
    std::string digits;
    while (at != end && std::string("+-.eE0123456789").find(*at) != std::string::npos) digits += *at++;
    std::istringstream stream(digits);
    stream.imbue(std::locale::classic());
    double value;
    if (!(stream >> value) || stream.peek() != EOF) fail();
    return value;
  }

  std::string string() {
    std::string text;
    if (!take("\"")) fail();
    while (at != end && *at != '"') {
      if (*at != '\\') {
        text += *at++;
        continue;
      }
      static const std::string escapes = "\"\\/bfnrt", meanings = "\"\\/\b\f\n\r\t";
      ++at;
      if (at == end) fail();
      if (*at == 'u') {
        ++at;
        unsigned code = unit();
        if (code >= 0xd800 && code < 0xdc00 && take("\\u")) {
          const unsigned low = unit();
          code = low >= 0xdc00 && low < 0xe000 ? 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00) : 0xfffd;
        }
        if (!code || (code >= 0xd800 && code < 0xe000)) code = 0xfffd;  // no character, or half of one
        append(text, code);
      } else {
        const size_t found = escapes.find(*at++);
        if (found == std::string::npos) fail();
        text += meanings[found];
      }
    }
    if (!take("\"")) fail();
    return text;
  }
  unsigned unit() {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i, ++at) {
      if (at == end) fail();
      const char c = *at;
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail();
      code = 16 * code + digit;
    }
    return code;
  }
  static void append(std::string& text, unsigned code) {  // as UTF-8
    if (code < 0x80) {
      text += char(code);
      return;
    }
    const int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    text += char((0xf00 >> (more + 1) & 0xff) | ((code >> 6 * more) & 0x3f));
    for (int i = more - 1; i >= 0; --i) text += char(0x80 | ((code >> 6 * i) & 0x3f));
  }
};

}  // namespace far_json
