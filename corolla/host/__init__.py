"""Files, text, processes, logs and certificates of one machine; nothing here knows of learning."""
