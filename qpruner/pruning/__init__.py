"""The one-time structured cut: importance, selection, compensation, surgery."""
