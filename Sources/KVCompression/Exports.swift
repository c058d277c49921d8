@_exported public import KVBackendCPU
@_exported public import KVBackendCUDA
@_exported public import KVCore
@_exported public import KVEviction
@_exported public import KVLowRank
@_exported public import KVMerging
@_exported public import KVQuantization
@_exported public import KVTensorFiles
