// The cache of keys and values, as the kernels of attention get it: the first part of their arguments.
#pragma once
#include "common.cuh"

struct Cache {
  void *k;               // [batch, kv_heads, length, d], strides below
  void *v;
  float *k_scale;        // [batch, kv_heads, length]; or null: k and v are of type IN
  float *v_scale;
  u64 k_batch;           // strides in bytes
  u64 k_head;
  u64 k_position;
  u64 v_batch;
  u64 v_head;
  u64 v_position;
  u64 ks_batch;          // strides of the scales in elements
  u64 ks_head;
  u64 vs_batch;
  u64 vs_head;
  int heads;             // of q
  int kv_heads;
  int length;
  int d;
};
