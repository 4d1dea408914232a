"""What a client did wrong, or the server cannot do now: a status and one line."""

from dataclasses import dataclass


@dataclass(eq=False)
class ServiceError(Exception):
    """An answer other than 200.

    Args:
      status: HTTP status.
      message: one line for the client; names no path and no internal.
      code: a word for programs, as in OpenAI's errors.
      retry_after_s: when to come again, for 429 and 503.
    """

    status: int
    message: str
    code: str = "invalid_request"
    retry_after_s: float | None = None

    def __str__(self) -> str:
        """Return the message."""
        return self.message

    def as_json(self) -> dict[str, object]:
        """OpenAI's shape: message, type, param, code."""
        if self.status == 429:
            kind = "rate_limit_error"
        elif self.status >= 500:
            kind = "server_error"
        else:
            kind = "invalid_request_error"
        text = " ".join(self.message.split())[:300]
        return {"message": text, "type": kind, "param": None, "code": self.code}


def bad_request(message: str) -> ServiceError:
    """400: the request itself is wrong."""
    return ServiceError(400, message)
