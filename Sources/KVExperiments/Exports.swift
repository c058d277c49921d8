@_exported public import KVTensorFiles
