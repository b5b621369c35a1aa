// The options of the operators, each once: its type in the schema, its type in C++, its name. ops.cpp makes the schemas
// from these lists, operators.h the parameters and the structs.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

// clang-format off
// What differs from row to row, [rows] each.
#define KLDIV_ROW_OPTIONS(OPTION)                         \
  OPTION("Tensor?", std::optional<Tensor>, labels)        \
  OPTION("Tensor?", std::optional<Tensor>, row_scale)

// Which loss. divisor: the sum of the rows' losses is divided by it; without one, losses are returned row by row.
#define KLDIV_DIVERGENCE_OPTIONS(OPTION)                  \
  OPTION("float", double, soft_scale)                     \
  OPTION("float", double, hard_scale)                     \
  OPTION("SymInt?", std::optional<int64_t>, divisor)      \
  OPTION("str", std::string, divergence)                  \
  OPTION("float", double, parameter)

// How logits become log-probabilities; the two lists are [student, teacher].
#define KLDIV_LOGITS_OPTIONS(OPTION)                      \
  OPTION("float", double, temperature)                    \
  OPTION("float[]", std::vector<double>, logit_scale)     \
  OPTION("float[]", std::vector<double>, logit_softcap)   \
  OPTION("int?", std::optional<int64_t>, valid_vocab)
// clang-format on

// The options of the losses, and those of token_stats.
#define KLDIV_LOSS_OPTIONS(OPTION) \
  KLDIV_ROW_OPTIONS(OPTION)        \
  KLDIV_DIVERGENCE_OPTIONS(OPTION) \
  KLDIV_LOGITS_OPTIONS(OPTION)
#define KLDIV_STATS_OPTIONS(OPTION) \
  KLDIV_ROW_OPTIONS(OPTION)         \
  KLDIV_LOGITS_OPTIONS(OPTION)

// An option as text of a schema, as a parameter after others, as an initializer, and as a member.
#define KLDIV_SCHEMA(SCHEMA_TYPE, TYPE, NAME) ", " SCHEMA_TYPE " " #NAME
#define KLDIV_PARAMETER(SCHEMA_TYPE, TYPE, NAME) , TYPE NAME
#define KLDIV_ARGUMENT(SCHEMA_TYPE, TYPE, NAME) std::move(NAME),
#define KLDIV_MEMBER(SCHEMA_TYPE, TYPE, NAME) TYPE NAME;
