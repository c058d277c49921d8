/* The operations of a level that lanes_*.h define; the entries `logits` and `accumulate` may be others, and `attend` may be NULL. */
#ifndef V_JOINED
#define V_JOINED NULL
#endif
#define V_TABLE(level_name, logits_entry, accumulate_entry, attend_entry)                                            \
  {                                                                                                                  \
    .name = level_name, .logits = logits_entry, .accumulate = accumulate_entry, .softmax = softmax,                  \
    .exp_shift = exp_shift, .axpy = axpy, .add_rows = add_rows, .scale_in_place = scale_in_place, .dot = dot,        \
    .turn = turn,                                                                                                    \
    .normalise_rows = normalise_rows, .compare_rows = compare_rows, .mix_rows = mix_rows,                            \
    .scan_rows = scan_rows, .fold = fold, .convert = convert,                                                        \
    .first_nonfinite = first_nonfinite, .encode_channel = encode_channel, .encode_row = encode_row,                  \
    .encode_blocks = encode_blocks, .decode = decode, .hadamard = hadamard, .read_memory = read_memory,              \
    .joined_logits = V_JOINED, .attend = attend_entry, CKV_STATISTICS,                                               \
  }
