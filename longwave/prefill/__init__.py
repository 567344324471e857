"""How a prompt is read: with a draft model that looks ahead (`ahead`), or shortened by one (`specpc`) or by the model
itself (`xl3m`)."""
