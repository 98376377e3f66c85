"""Parent process of one partition and one store member."""
