/* Certificates (DER) that clients present: a name is a proper string, and the digest of a key is always there. */
#include <string.h>

#include <openssl/x509.h>

#include "../identity.h"
#include "input.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
	const unsigned char *position = data;
	X509 *certificate = d2i_X509(NULL, &position, (long)size);
	unsigned char digest[DIGEST_BYTES];
	char name[MAX_NAME_BYTES];

	if(certificate){
		if(identity_common_name(certificate, name)){
			size_t length = strnlen(name, sizeof(name));

			EXPECT(length > 0 && length < sizeof(name));
		}
		identity_key_digest(certificate, digest);
		X509_free(certificate);
	}
	return 0;
}
