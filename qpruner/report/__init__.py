"""Results of a run: figures, statistics, report in HTML and Markdown, TensorBoard, model card."""
