/* What a certificate says about its owner. */
#ifndef FLEETWRIGHT_IDENTITY_H
#define FLEETWRIGHT_IDENTITY_H

#include <stdbool.h>

#include <openssl/x509.h>

/* Bytes of a SHA-256. */
#define DIGEST_BYTES 32
/* The longest user name (253 characters: the limit of a Kubernetes name), with its final NUL. */
#define MAX_NAME_BYTES 254

/* The common name. False where the subject has none or several, or where it is too long or contains a NUL. */
bool identity_common_name(X509 *certificate, char name[MAX_NAME_BYTES]);

/* The SHA-256 of the public key (SubjectPublicKeyInfo, DER). */
bool identity_key_digest(X509 *certificate, unsigned char digest[DIGEST_BYTES]);

/* Reads a digest in hexadecimal digits, in lower case. */
bool identity_parse_digest(const char *text, unsigned char digest[DIGEST_BYTES]);

/* The same, as a value of a file of users (user_file.h); NULL where the text is no digest. */
void *identity_new_digest(const char *text);

#endif
