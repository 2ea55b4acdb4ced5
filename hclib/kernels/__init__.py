"""Array kernels on torch and FAISS: features, distances, coreset, clustering, memory bank, maps."""
