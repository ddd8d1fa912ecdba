"""Training with centered columns and RMSNorms, compared with LayerNorm on small real data."""
