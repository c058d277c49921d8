/* Many query rows are taken V_TILE_QUERIES at a time, as registers allow, and the rest in few sizes. */

/* Query rows taken at a time: as few of the sizes as there are that leave none alone. */
CKV_INLINE uint32_t v_queries_at_a_time(uint32_t rest) {
  if (rest >= V_TILE_QUERIES && rest != 8 && rest != 16) return V_TILE_QUERIES;
  return rest >= 8 && V_TILE_QUERIES > 8 ? 8 : rest >= 4 ? 4 : rest >= 2 ? 2 : 1;
}

CKV_INLINE size_t v_query_groups(uint32_t m) {
  size_t groups = 0;
  for (; m; groups++) m -= v_queries_at_a_time(m);
  return groups;
}

/* CALL(n), n = what v_queries_at_a_time gave, as a constant. */
#define V_FOR_QUERIES(n, CALL)                                                                                \
  do {                                                                                                        \
    if (n == V_TILE_QUERIES) CALL(V_TILE_QUERIES);                                                            \
    else if (V_TILE_QUERIES > 8 && n == 8) CALL(8);                                                           \
    else if (n == 4) CALL(4);                                                                                 \
    else if (n == 2) CALL(2);                                                                                 \
    else CALL(1);                                                                                             \
  } while (0)
